"""Messages -> token ids and trained-token mask: the only place that renders chat templates.

Every answer is what a rollout would have produced at its turn. The prompt is the template's text of the messages before
it, with the generation prompt; the answer is what follows, up to and including the token that ends the turn; both are
tokenised apart. No template needs `{% generation %}` tags. Text that a template writes after the end of a turn belongs
to the prompt of later turns and is left out after the last.

An earlier answer that the template shows otherwise in later turns (reasoning that is taken out, say) is context there:
no rollout produces it in that form. A template that ends turns without a token gets the tokenizer's end token after
every answer, in prompts too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from rlhf.bounds import OutOfTimeError, memory_limit, time_limit
from rlhf.data.encode import Conversation, Encoder, Ids, Mask, Region
from rlhf.data.messages import Message, message
from rlhf.data.spans import Pieces, Span, around_content, cut_pieces, holds, match_contents, without_opening
from rlhf.errors import CheckpointError, DataError, RecipeError, UnsafeError

# Stands for a message's content: a private-use character that no text, trimming or pattern of a template touches.
_MARK = "\ue0f1"
# Templates that print today's date would make other prompts tomorrow; those that can be told a date are told this one.
_DATE = "26 Jul 2024"
_SECONDS, _MEMORY = 10.0, 1 << 30  # that rendering one conversation may take; it takes milliseconds and kilobytes
_LONGEST = 1 << 20  # bytes of a template file
_ANOTHER = "Choose another model.chat_template (chatml, plain or a .jinja file)."
BUILT_IN = ("chatml", "plain")
_CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class _Answer:
    """An answer at its turn: `prompt` is all text before it; `end` follows it, written by the template or by us."""

    prompt: str
    pieces: Pieces
    end: str
    is_written: bool

    @property
    def body(self) -> str:
        return "".join(text for text, _ in self.pieces)


class ChatTemplate:
    """A tokenizer's chat template. `set_template` gives a tokenizer one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise CheckpointError("expected a chat template, found none", where=tokenizer.name_or_path or "tokenizer")
        self._added = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._scaffolds: dict[tuple[str, ...], list[str] | None] = {}
        self._rendered = functools.lru_cache(maxsize=256)(
            self._render_now
        )  # a row asks for the same text several times
        self._last_context: tuple[list[Message] | None, list[tuple[Region, int | None]]] = (None, [])
        question, answer = message("user", "a"), message("assistant", _MARK)
        self._after_last = self._render([question, answer], False, "chat template").rpartition(_MARK)[2]
        end = self._end_of(self._after_last)
        if end is None and tokenizer.eos_token is None:
            raise CheckpointError(
                "expected an end token, found none in the tokenizer nor in its chat template",
                where=tokenizer.name_or_path or "tokenizer",
                fix="Give the tokenizer an eos_token, or choose a model.chat_template that ends answers with a token.",
            )
        self.end_token: str = self._last_added(end) if end is not None else tokenizer.eos_token
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control = special | set(tokenizer.all_special_tokens) | self._structure()
        self._encoder = Encoder(tokenizer, self._control)

    def _structure(self) -> set[str]:
        """Added tokens by which the template tells turns apart; some tokenizers do not call these special.

        Taken from the text before the second question: what a template writes around an answer only when it is the last
        one, such as marks of reasoning, is for the model to write too.
        """
        asked = [message("user", "a"), message("assistant", "b"), message("user", _MARK)]
        try:
            text = self._render(asked, False, "chat template")
        except DataError:  # a template for one question and one answer
            text = self._render(asked[2:], False, "chat template")
        before = text.partition(_MARK)[0]
        return {token for token in self._added if token and token in before}

    # --- what a row is made of ---

    def text(self, text: str, where: str) -> Conversation:
        """A plain text: the tokenizer's begin token, if it has one, then text and end token, which are trained."""
        begin = self.tokenizer.bos_token
        end = self.tokenizer.eos_token or self.end_token
        body = Region(((text, True), (end, False)), trained=True)
        return Conversation((Region(((begin, False),)), body) if begin else (body,), where)

    def prompt(self, messages: Sequence[Message], where: str) -> Conversation:
        """The prompt of a rollout after these messages."""
        return Conversation(tuple(region for region, _ in self._context(list(messages), where)), where)

    def conversation(self, messages: Sequence[Message], first: int, where: str) -> Conversation:
        """A conversation that ends with an answer. The assistant's messages from index `first` on are trained."""
        messages = list(messages)
        assert messages[-1]["role"] == "assistant", messages[-1]["role"]
        regions = [
            replace(region, trained=index is not None and index >= first)
            for region, index in self._context(messages[:-1], where)
        ]
        answer = self._answer(messages, where)
        regions.append(Region((*answer.pieces, (answer.end, False)), trained=True))
        return Conversation(tuple(regions), where)

    def answered(self, messages: Sequence[Message], answer: str, where: str, *, finished: bool) -> Conversation:
        """A prompt and a sampled answer to it, as text: what a model with this template reads of another's rollout.

        An answer that ended by itself gets the template's end token, one that was cut off does not.
        """
        row = self.conversation([*messages, message("assistant", answer)], len(messages), where)
        if finished:
            return row
        last = replace(row.regions[-1], pieces=row.regions[-1].pieces[:-1])
        return replace(row, regions=(*row.regions[:-1], *([last] if last.pieces else [])))

    def encode(self, rows: Sequence[Conversation]) -> list[tuple[Ids, Mask]]:
        """Token ids and trained-token mask of every row."""
        return self._encoder.encode(rows)

    # --- regions ---

    def _context(self, messages: list[Message], where: str) -> list[tuple[Region, int | None]]:
        """The regions of the prompt after `messages`: earlier answers with their indices, and what is between them."""
        if messages != self._last_context[0]:  # both sides of a pair have one prompt
            self._last_context = (messages, self._make_context(messages, where))
        return self._last_context[1]

    def _make_context(self, messages: list[Message], where: str) -> list[tuple[Region, int | None]]:
        text = self._prompt_text(messages, where)
        spans = self._spans(messages, text, where) if messages else []
        regions: list[tuple[Region, int | None]] = []
        at = 0
        for i, one in enumerate(messages):
            if one["role"] != "assistant":
                continue
            answer = self._answer(messages[: i + 1], where)
            start, stop = len(answer.prompt), len(answer.prompt) + len(answer.body)
            if start < at or not text.startswith(answer.prompt + answer.body):
                continue
            if text.startswith(answer.end, stop):
                stop += len(answer.end)
            elif answer.is_written:
                continue
            regions.append((Region(cut_pieces(text, at, start, spans)), None))
            regions.append((Region((*answer.pieces, (answer.end, False))), i))
            at = stop
        regions.append((Region(cut_pieces(text, at, len(text), spans)), None))
        return [(region, index) for region, index in regions if region.pieces]

    def _prompt_text(self, messages: list[Message], where: str) -> str:
        """All that stands before an answer to `messages`; templates do not render none, but they do a bare answer."""
        if messages:
            return self._render(messages, True, where)
        return self._render([message("assistant", _MARK)], False, where).partition(_MARK)[0]

    def _answer(self, messages: list[Message], where: str) -> _Answer:
        """The last message as the answer of a rollout after the others."""
        content = messages[-1]["content"]
        text = self._render(messages, False, where)
        prompt = self._prompt_text(messages[:-1], where)
        after, body = self._after_last, None
        if text.startswith(prompt) and text.endswith(after):
            body = text[len(prompt) : len(text) - len(after)]
        if body is None or not holds(body, content):
            marked = self._render([*messages[:-1], message("assistant", _MARK)], False, where)
            before, _, after = marked.rpartition(_MARK)
            if text.startswith(prompt) and text.endswith(after):
                body = text[len(prompt) : len(text) - len(after)]
            if body is None or not holds(body, content):
                # The template does not show the whole answer: a rollout after this prompt would still have to give it.
                body = without_opening(content, prompt[len(os.path.commonprefix([prompt, before])) :])
        end = self._end_of(after)
        return _Answer(prompt, around_content(body, content), end or self.end_token, end is not None)

    def _spans(self, messages: list[Message], text: str, where: str) -> list[Span]:
        """Where in the rendered prompt the messages' contents stand, in order."""
        scaffold = self._scaffold(tuple(m["role"] for m in messages), where)
        spans = match_contents(text, scaffold, [m["content"] for m in messages]) if scaffold else None
        if spans is not None:
            return spans
        spans = []
        for i, one in enumerate(messages):  # the template looks into contents: replace one at a time
            marked = [*messages[:i], message(one["role"], _MARK), *messages[i + 1 :]]
            shown = self._render(marked, True, where)
            before, found, after = shown.partition(_MARK)
            if found and _MARK not in after and text.startswith(before) and text.endswith(after):
                spans.append((len(before), max(len(before), len(text) - len(after))))
            elif found:
                spans += self._find(one["content"], text, shown, where)
        return sorted(spans)

    def _find(self, content: str, text: str, shown: str, where: str) -> list[Span]:
        """Every place of a content that the template repeats or rearranges; `shown` has a mark in its place."""
        words = content.strip()
        places = [(m.start(), m.end()) for m in re.finditer(re.escape(words), text)] if words else []
        if not places and any(text.count(token) > shown.count(token) for token in self._control):
            raise DataError(
                "messages: expected text, found a control token in a message that the chat template rearranges",
                where=where,
                fix="Remove control tokens from the row's text.",
            )
        return places

    def _scaffold(self, roles: tuple[str, ...], where: str) -> list[str] | None:
        """The template's own text around contents, where it does not depend on what they are."""
        if roles not in self._scaffolds:
            marks = [f"{_MARK}{i}{_MARK}" for i in range(len(roles))]
            pieces: list[str] | None = []
            rest = self._render([message(r, mark) for r, mark in zip(roles, marks, strict=True)], True, where)
            for mark in marks:
                before, found, rest = rest.partition(mark)
                pieces = None if pieces is None or not found else [*pieces, before]
            self._scaffolds[roles] = None if pieces is None or _MARK in rest else [*pieces, rest]
        return self._scaffolds[roles]

    def _end_of(self, after: str) -> str | None:
        """The text after an answer up to and including the first token, None where there is no token."""
        places = [(after.find(token), -len(token)) for token in self._added if token and token in after]
        if not places:
            return None
        start, length = min(places)
        return after[: start - length]

    def _last_added(self, text: str) -> str:
        return next(token for token in self._added if token and text.endswith(token))

    # --- rendering ---

    def _render(self, messages: list[Message], generate: bool, where: str) -> str:
        """The template's text."""
        try:
            return self._rendered(tuple((m["role"], m["content"]) for m in messages), generate)
        except SecurityError as error:
            raise UnsafeError(f"the chat template was stopped by its sandbox: {error}", where=where) from error
        except (OutOfTimeError, MemoryError) as error:
            limit = f"{_SECONDS:g} s" if isinstance(error, OutOfTimeError) else f"{_MEMORY >> 20} MiB"
            what = f"expected a chat template that renders a conversation within {limit}, found one that does not"
            raise UnsafeError(what, where=where, fix=_ANOTHER) from None
        except Exception as error:  # noqa: BLE001  a template may raise whatever Python can
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(
                f"messages: expected a conversation that the chat template takes, found {roles}: {error}",
                where=where,
                fix=f"Change the rows, or c{_ANOTHER[1:]}",
            ) from error

    def _render_now(self, messages: tuple[tuple[str, str], ...], generate: bool) -> str:
        """Rendering in transformers' immutable sandbox, with little time and memory."""
        with time_limit(_SECONDS), memory_limit(_MEMORY):
            text = self.tokenizer.apply_chat_template(
                [message(role, content) for role, content in messages],
                tokenize=False,
                add_generation_prompt=generate,
                return_dict=False,
                date_string=_DATE,
            )
        assert isinstance(text, str), type(text)
        return text


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any = None, extra: Sequence[str] = ()
) -> list[int]:
    """The ids that end an answer: of the tokenizer, the generation configuration, the template's turns, and `extra`."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ChatTemplate(tokenizer).end_token)}
    for text in extra:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise RecipeError(
                f"expected a token of the vocabulary, found {text!r}, which is {len(ids)} tokens",
                where="sampling.stop",
                fix="Answers end with single tokens; a text of several tokens cannot stop them.",
            )
        ends.add(ids[0])
    configured = None if generation_config is None else generation_config.eos_token_id
    ends.update([configured] if configured is None or isinstance(configured, int) else configured)
    return sorted(index for index in ends if index is not None)


# --- giving a tokenizer a template, and telling tokenizers apart -----------------------------------------------------


def set_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give the tokenizer a built-in template (chatml, plain) or a .jinja file's; None keeps its own, else plain."""
    if name is None and tokenizer.chat_template:
        return
    where = f"model.chat_template: {name or 'plain'}"
    if name == "chatml" and not tokenizer.get_vocab().keys() >= set(_CHATML):
        raise RecipeError(
            f"expected a tokenizer with {' and '.join(_CHATML)}, found none",
            where=where,
            fix="Use plain, a .jinja file with marks that the tokenizer has, or a model whose tokenizer has these.",
        )
    tokenizer.chat_template = _read_template(name or "plain")
    try:
        ChatTemplate(tokenizer)
    except (DataError, CheckpointError) as error:
        raise RecipeError(
            f"expected a chat template that renders a question and its answer: {error.what}", where=where
        ) from error


def _read_template(name: str) -> str:
    if name in BUILT_IN:
        return (resources.files("rlhf.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(os.path.expanduser(name))
    if path.suffix != ".jinja" or not path.is_file():
        raise RecipeError(
            f"expected {', '.join(BUILT_IN)} or a .jinja file that exists, found {name}", where="model.chat_template"
        )
    with path.open("rb") as file:
        content = file.read(_LONGEST + 1)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"expected UTF-8 text, found: {error}", where=f"model.chat_template: {name}") from error
    if len(content) > _LONGEST:
        what = f"expected at most {_LONGEST >> 20} MiB of template, found more"
        raise RecipeError(what, where=f"model.chat_template: {name}")
    return text


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template's text: equal hashes render equal prompts."""
    return hashlib.sha256((tokenizer.get_chat_template() if tokenizer.chat_template else "").encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's ids: vocabulary, merges, normalisation, added tokens, begin and end token.

    The padding token is left out, since nothing is masked by it; so is the chat template, which has its own hash.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: backend[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps([parts, ends], sort_keys=True).encode()).hexdigest()
