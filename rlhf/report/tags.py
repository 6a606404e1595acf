"""HTML from nested calls. Text is escaped unless it came out of these functions itself."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""


Child = str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Markup:
    """An element. `class_` stands for class; an attribute that is None or False is left out, True stands alone."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(value)}"')
    if name in _EMPTY:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{name}>")


_EMPTY = {"meta", "br", "hr"}


def join(children: Child) -> Markup:
    """Children one after another, plain text escaped, None left out."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(html.escape(_printable(children)))
    return Markup("".join(join(child) for child in children))


def _printable(text: str) -> str:
    """Without characters that no HTML document may hold."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 159 else "\ufffd" for c in text)
