"""Conversations: lists of messages in any of the usual spellings, and transcripts in one text -> roles and contents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf.data.readers import describe
from rlhf.errors import DataError

Message = dict[str, str]  # role: system | user | assistant | tool, content

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_BAD = re.compile("[\0\ud800-\udfff]")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def check_text(value: Any, where: str, field: str) -> str:
    """The value as text that a tokenizer can take."""
    if not isinstance(value, str):
        raise DataError(f"{field}: expected text, found {describe(value)}", where=where)
    if bad := _BAD.search(value):
        name = "a NUL character" if bad.group() == "\0" else f"half of a surrogate pair (\\u{ord(bad.group()):04x})"
        raise DataError(f"{field}: expected text, found {name} at character {bad.start() + 1}", where=where)
    return value


def message(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


def parse_messages(value: Any, where: str, field: str) -> list[Message]:
    """Messages as {role, content} or {from, value}; a single one may stand without a list."""
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, (list, tuple)):
        raise DataError(f"{field}: expected a list of messages, found {describe(value)}", where=where)
    if not items:
        raise DataError(f"{field}: expected at least one message, found an empty list", where=where)
    return [_parse_message(item, where, f"{field}[{i}]") for i, item in enumerate(items)]


def _parse_message(item: Any, where: str, field: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{field}: expected {{role, content}} or {{from, value}}, found {describe(item)}", where=where)
    if {"role", "content"} <= item.keys():
        role, content = "role", "content"
    elif {"from", "value"} <= item.keys():
        role, content = "from", "value"
    else:
        raise DataError(f"{field}: expected {{role, content}} or {{from, value}}, found {describe(item)}", where=where)
    if item.get("tool_calls"):
        raise DataError(f"{field}.tool_calls: expected a message of text, found a tool call", where=where)
    name = check_text(item[role], where, f"{field}.{role}")
    if name.lower() not in ROLES:
        raise DataError(f"{field}.{role}: expected one of {', '.join(ROLES)}, found {describe(name)}", where=where)
    return message(ROLES[name.lower()], _content(item[content], where, f"{field}.{content}"))


def _content(value: Any, where: str, field: str) -> str:
    """Text, or a list of parts that are all text."""
    if isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                found = describe(part.get("type") if isinstance(part, dict) else part)
                raise DataError(f"{field}[{i}]: expected a part of type text, found {found}", where=where)
        return "".join(check_text(part.get("text"), where, f"{field}[{i}].text") for i, part in enumerate(value))
    return check_text(value, where, field)


def is_dialogue(value: Any) -> bool:
    """Whether a value is a transcript in the style of `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    if not isinstance(value, str):
        return False
    first = _SPEAKER.match(value)
    return first is not None and "\n\nAssistant:" in "\n\n" + value.lstrip()


def parse_dialogue(value: Any, where: str, field: str) -> list[Message]:
    """A transcript as messages. White space around turns is dropped, turns of one speaker in a row are joined."""
    text = check_text(value, where, field)
    if not is_dialogue(text):
        raise DataError(
            f"{field}: expected a transcript \\n\\nHuman: ... \\n\\nAssistant: ..., found {describe(text)}", where=where
        )
    parts = _SPEAKER.split(text)[1:]  # speaker, words, speaker, words, ...
    turns: list[Message] = []
    for speaker, words in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{words.strip()}".strip()
        else:
            turns.append(message(role, words.strip()))
    return turns


def common_prefix(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages two conversations share from the start; both keep at least one message of their own."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return shared


def as_text(messages: Sequence[Message]) -> str:
    """Messages as a person reads them: the content of one, a transcript of several."""
    spoken = [m for m in messages if m["role"] != "system"]
    if len(spoken) == 1:
        return spoken[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
