"""`--trust-code MODEL@REVISION`: a model's own code runs where the command line says so, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rlhf.cli.stages import StageCommand
from rlhf.errors import RecipeError, UnsafeError
from rlhf.models.trust import code_hash, may_run_code, trust_only, trusted_revision

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from .helper import NAME

with open(MARK, "a") as file:
    file.write("ran\\n")


class MineConfig(LlamaConfig):
    model_type = NAME


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def registry():
    """What a test trusts ends with it."""
    yield trust_only
    trust_only([])


def with_code(model: Path, folder: Path, mark: Path) -> Path:
    """A copy of a published Llama as a model that transformers does not know."""
    shutil.copytree(model, folder)
    (folder / "modeling_mine.py").write_text(CODE.replace("MARK", repr(str(mark))))
    (folder / "helper.py").write_text('NAME = "mine"\n')
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    auto["AutoModel"] = "absent.Model"  # of a file that nobody has sent along
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_stage_with_a_models_own_code(cli, tiny, tmp_path):
    mark = tmp_path / "mark"
    model = with_code(tiny.root / "sft" / "model", tmp_path / "mine", mark)

    def run(name: str, *options: str | Path, **source: Path | str):
        words = json.dumps({key: str(value) for key, value in source.items()})
        return cli(*tiny.command("sft", "--name", name, "--set", f"model={words}", *options))

    refused = run("mine", path=model)
    assert refused.code == 9 and not mark.exists() and not (tiny.root / "mine").exists()
    option = f"--trust-code {model}@{code_hash(model)}"
    assert "found auto_map: it would run code from the model's folder\n  If you have read its code" in refused.err
    assert option in refused.err

    done = run("mine", *option.split(), path=model)
    assert done.code == 0, done.err
    assert mark.exists()
    provenance = json.loads((tiny.root / "mine" / "provenance.json").read_text())
    assert provenance["inputs"]["code"] == {str(model): code_hash(model)}

    # The published folder carries the code, loads with plain transformers, and asks for trust of its own.
    published = tiny.root / "mine" / "model"
    assert {file.name for file in published.glob("*.py")} == {"modeling_mine.py", "helper.py"}
    assert "AutoModel" not in json.loads((published / "config.json").read_text())["auto_map"]
    loaded = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    mark.unlink()
    child = {"from": "mine"}
    refused = run("child", **child)
    assert refused.code == 9 and not mark.exists()
    option = f"--trust-code {published}@{code_hash(published)}"
    assert option in refused.err
    done = run("child", *option.split(), **child)
    assert done.code == 0 and mark.exists(), done.err

    # One byte of the code, of the file that is imported or of one that it imports, and it is other code.
    mark.unlink()
    trusted = f"{model}@{code_hash(model)}"
    for file in ("modeling_mine.py", "helper.py"):
        before = (model / file).read_text()
        (model / file).write_text(before + "\n")
        refused = run("again", "--trust-code", trusted, path=model)
        assert refused.code == 9 and "expected the code that --trust-code names" in refused.err
        (model / file).write_text(before)
    (model / "more.py").write_text("")
    assert run("again", "--trust-code", trusted, path=model).code == 9
    assert not mark.exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "trust_code", "model.trust_remote_code", "model.trust_code"])
def test_no_recipe_can_ask_for_it(cold_cli, tiny, key):
    done = cold_cli(*tiny.command("sft", "--name", "none", "--set", f"{key}=true"))
    assert done.code == 2 and f"{key}: expected a known key" in done.err


@pytest.mark.parametrize(
    "text", ["", "model", "@", f"@{COMMIT}", "a/b@main", "a/b@v1", f"a/b@{COMMIT[:39]}", "a/b@HEAD"]
)
def test_only_a_whole_commit_will_do(registry, text):
    with pytest.raises(RecipeError, match="expected MODEL@REVISION with "):
        registry([text])


def test_a_folder_is_known_by_its_code_wherever_it_is_named_from(registry, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.py").write_text("pass")
    with pytest.raises(RecipeError, match="the hash of a folder's code"):
        registry([f"{tmp_path}/m@{COMMIT}"])
    registry([f"{tmp_path}/m@{code_hash(tmp_path / 'm')}"])
    monkeypatch.chdir(tmp_path)
    assert trusted_revision("m") == trusted_revision("./m") == code_hash(Path("m"))
    assert trusted_revision(str(tmp_path)) is None
    registry([])
    assert trusted_revision("m") is None


ASKS = {"auto_map": {"AutoConfig": "a.B"}}


def test_of_a_hub_id_the_recipe_names_the_same_commit(registry):
    assert not may_run_code("a/b", None, {}, "x")
    with pytest.raises(UnsafeError, match="found auto_map") as refusal:
        may_run_code("a/b", COMMIT, ASKS, "x")
    assert "--trust-code a/b@COMMIT, and the same commit as `revision`" in str(refusal.value)
    registry([f"a/b@{COMMIT}"])
    assert may_run_code("a/b", COMMIT, ASKS, "x")
    for revision, found in ((None, "no revision in the recipe"), ("main", "main"), ("f" * 40, "f" * 40)):
        with pytest.raises(UnsafeError, match=rf"the revision that --trust-code names \({COMMIT}\), found {found}"):
            may_run_code("a/b", revision, ASKS, "x")
    with pytest.raises(UnsafeError, match="found auto_map"):
        may_run_code("a/c", COMMIT, ASKS, "x")


@pytest.mark.parametrize("value", ["other/model--a.B", ["a.B", "other/model--a.C"], [None, "other/model--a.C"]])
def test_code_of_another_model_is_never_run(registry, value):
    registry([f"a/b@{COMMIT}"])
    assert may_run_code("a/b", COMMIT, {"auto_map": {"AutoConfig": "a/b--a.B"}}, "x")
    with pytest.raises(UnsafeError, match="expected code of this model, found that of other/model"):
        may_run_code("a/b", COMMIT, {"auto_map": {"AutoModel": value}}, "x")


def test_ranks_are_told():
    command = StageCommand("sft", Path("r.yaml"), Path("run"), trust_code=[f"a/b@{COMMIT}", f"c/d@{COMMIT}"])
    words = command.argv()
    assert words[-4:] == ["--trust-code", f"a/b@{COMMIT}", "--trust-code", f"c/d@{COMMIT}"]
