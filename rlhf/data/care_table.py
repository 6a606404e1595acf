"""The report on data as tables: of all rows, and beside it of those that the recipe's filter leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from rlhf.data.care import Care, Finding, LengthBias, Lengths, NoiseFinding
from rlhf.data.noise import Share

Line = tuple[str, str]


def tables(title: str, cares: Sequence[Care]) -> Iterator[Table]:
    """Figures, then findings with the places of a few rows each. cares: of all rows, and after a filter."""
    headers = ["all rows", "after the filter"][: len(cares)]
    figures = Table("", *headers, title=title, title_justify="left", box=None, pad_edge=False)
    columns = [dict(_figures(care)) for care in cares]
    for name in dict.fromkeys(name for column in columns for name in column):
        figures.add_row(name, *(column[name] if name in column else "-" for column in columns))
    yield figures
    found = Table(box=None, pad_edge=False)
    for header in headers:
        found.add_column(header if len(headers) > 1 else "rows", justify="right")
    found.add_column("what is to be looked at")
    found.add_column("where", overflow="fold")
    named = [{finding.name: finding for finding in care.findings} for care in cares]
    for name in dict.fromkeys(name for column in named for name in column):
        cells = [_count(column[name]) if name in column else "-" for column in named]
        first = next(column[name] for column in named if name in column)
        found.add_row(*cells, name, ", ".join(first.examples))
    yield found


def _count(finding: Finding) -> str:
    return f"{finding.count:,} ({_percent(finding.count, finding.total)})" if finding.count else "0"


def _percent(count: float, total: float) -> str:
    return f"{100 * count / max(1, total):.1f} %"


def _figures(care: Care) -> Iterator[Line]:
    yield "training rows", f"{care.train:,}"
    yield "held-out rows", f"{care.held_out:,}"
    for name, lengths in care.lengths.items():
        yield f"{name}, tokens", _lengths(lengths)
    if care.bias is not None:
        yield from _bias(care.bias)
    for noise in care.noise:
        yield from _noise(noise)


def _lengths(lengths: Lengths) -> str:
    return f"median {lengths.median:g}, 95 % up to {lengths.p95:g}, longest {lengths.longest}"


def _bias(bias: LengthBias) -> Iterator[Line]:
    yield "chosen - rejected, tokens", f"mean {bias.mean:+.2f}, median {bias.median:+g}"
    yield "the longer answer is chosen", f"{_share(bias.longer_chosen)}; {bias.equally_long:,} are equally long"
    yield "length difference and label", f"correlation {bias.correlation:+.3f}"
    for name, value in (("score margin", bias.with_margin), ("reward model's margin", bias.with_reward)):
        if value is not None:
            yield f"length difference and {name}", f"correlation {value:+.3f}"
    yield "longer by most", ", ".join(bias.examples) or "none"


def _share(share: Share) -> str:
    percent = _percent(share.count, share.total)
    return f"{percent} of {share.total:,}, 95 % interval {100 * share.low:.1f} to {100 * share.high:.1f}"


def _noise(finding: NoiseFinding) -> Iterator[Line]:
    noise, rows = finding.noise, finding.rows
    yield f"reward model disagrees, {rows}", f"{_share(noise.disagree)}; {noise.ties:,} ties"
    yield f"as Bradley-Terry expects, {rows}", f"{100 * noise.expected:.1f} %"
    if noise.epsilon is None or noise.error is None:
        yield f"flipped labels, {rows}", "unknown: all scores are equal"
    else:
        estimate = f"{100 * noise.epsilon:.1f} % +- {100 * noise.error:.1f} (standard error)"
        yield f"flipped labels, {rows}", f"{estimate}, if the reward model is right"
    yield f"disagrees most, {rows}", ", ".join(finding.examples) or "none"
