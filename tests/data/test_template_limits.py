"""Chat templates are programs of strangers: they get no way out, little time and little memory."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import pytest

from rlhf.data import chat
from rlhf.data.chat import ChatTemplate, set_template
from rlhf.errors import DataError, RecipeError, UnsafeError
from scripts.reliability.payloads import BOMBS, TEMPLATES
from tests.data.conftest import build_tokenizer

AROUND = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    monkeypatch.setattr(chat, "_MEMORY", 256 << 20)


@pytest.mark.parametrize("payload", TEMPLATES)
def test_no_template_gets_out(tmp_path, hurried, payload):
    """Some are stopped by the sandbox, some find nothing where they look; none makes the folder."""
    tokenizer = build_tokenizer(AROUND + payload.replace("MARK", str(tmp_path / "mark")))
    try:
        ChatTemplate(tokenizer)
    except (UnsafeError, DataError) as error:
        assert error.exit_code in (3, 9)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("payload", BOMBS)
def test_every_template_comes_to_an_end(hurried, payload):
    tokenizer = build_tokenizer(AROUND + payload)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    with pytest.raises((UnsafeError, DataError), match="expected a (chat template that renders|conversation that the)"):
        ChatTemplate(tokenizer)
    assert time.monotonic() - started < 5
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("payload", [*TEMPLATES, *BOMBS])
def test_in_a_row_it_is_text(payload):
    template = ChatTemplate(build_tokenizer(AROUND))
    row = template.conversation(
        [{"role": "user", "content": payload}, {"role": "assistant", "content": payload}], 1, "row 1"
    )
    assert "".join(text for region in row.regions for text, _ in region.pieces).count(payload) == 2


@pytest.mark.parametrize(("content", "found"), [(b" " * (1 << 20) + b"x", "1 MiB"), (b"\xff\xfe", "UTF-8")])
def test_a_template_file_is_a_page_of_text(tmp_path: Path, content, found):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(RecipeError, match=found):
        set_template(build_tokenizer(AROUND), str(tmp_path / "t.jinja"))
