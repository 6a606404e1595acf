"""Where the contents of messages stand in the text that a chat template made of them. Text in, text out."""

from __future__ import annotations

Span = tuple[int, int]  # start and end in a text
Pieces = tuple[tuple[str, bool], ...]  # consecutive parts of a text, and whether each comes from the data


def match_contents(text: str, scaffold: list[str], contents: list[str]) -> list[Span] | None:
    """Where the contents, trimmed or not, stand between the scaffold's pieces; None where they do not fit."""
    if not text.startswith(scaffold[0]):
        return None
    spans, at = [], len(scaffold[0])
    for content, after in zip(contents, scaffold[1:], strict=True):
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        fits = (form for form in forms if text.startswith(form, at) and text.startswith(after, at + len(form)))
        form = next(fits, None)
        if form is None:
            return None
        spans.append((at, at + len(form)))
        at += len(form) + len(after)
    return spans if at == len(text) else None


def cut_pieces(text: str, start: int, stop: int, spans: list[Span]) -> Pieces:
    """text[start:stop] as pieces, those inside a span being data."""
    pieces, at = [], start
    for left, right in spans:
        left, right = max(left, at), min(right, stop)
        if left < right:
            pieces += [(text[at:left], False), (text[left:right], True)]
            at = right
    pieces.append((text[at:stop], False))
    return tuple(piece for piece in pieces if piece[0])


def around_content(body: str, content: str) -> Pieces:
    """An answer as pieces: the content is data, what the template puts around it is not."""
    at = body.find(content.strip())
    if not content.strip() or at < 0:  # the template has rearranged the content: all of it counts as data
        return ((body, True),) if body else ()
    return cut_pieces(body, 0, len(body), [(at, at + len(content.strip()))])


def holds(body: str, content: str) -> bool:
    """Whether all of the content is in the answer, white space aside."""
    return content.strip() in body or "".join(content.split()) in "".join(body.split())


def without_opening(content: str, opened: str) -> str:
    """The content less what the generation prompt has already written of it, such as a mark that opens reasoning."""
    head = opened.strip()
    if not head or not content.lstrip().startswith(head):
        return content
    rest = content.lstrip()[len(head) :]
    return rest.lstrip("\n") if opened.endswith("\n") else rest
