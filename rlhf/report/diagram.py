"""Which stage was made from which: boxes from left to right, parents before children."""

from __future__ import annotations

from rlhf.report.collect import RunPage
from rlhf.report.tags import Markup, tag

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 184, 50, 56, 16, 4
_EDGES = {"finished": "#10b981", "running": "#3b82f6", "failed": "#ef4444", "damaged": "#ef4444"}
_OTHER = "#f59e0b"  # stopped, interrupted, unknown


def depths(parents: dict[str, list[str]]) -> dict[str, int]:
    """Column of every stage: one right of its last parent. Parents outside the run are columns too."""
    found: dict[str, int] = {}

    def depth(name: str, path: tuple[str, ...]) -> int:
        if name in found:
            return found[name]
        above = [parent for parent in parents.get(name, []) if parent not in path]  # a damaged file may say anything
        found[name] = 1 + max((depth(parent, (*path, name)) for parent in above), default=-1)
        return found[name]

    for name in parents:
        depth(name, (name,))
    return found


def lineage_diagram(run: RunPage) -> Markup:
    """An SVG of the stages; a dashed box is a stage of another run."""
    columns: dict[int, list[str]] = {}
    for name, depth in depths(run.parents).items():
        columns.setdefault(depth, []).append(name)
    rows = max(map(len, columns.values()))
    place: dict[str, tuple[float, float]] = {}
    for depth, names in columns.items():
        offset = (rows - len(names)) * (_HEIGHT + _GAP_Y) / 2
        for number, name in enumerate(names):
            x = _MARGIN + depth * (_WIDTH + _GAP_X)
            place[name] = (x, _MARGIN + offset + number * (_HEIGHT + _GAP_Y))
    edges = [_edge(place[parent], place[name]) for name, above in run.parents.items() for parent in above]
    boxes = [_box(run, name, *place[name]) for name in place]
    width = 2 * _MARGIN + len(columns) * (_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + rows * (_HEIGHT + _GAP_Y) - _GAP_Y
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "role": "img", "aria_label": "lineage"}
    return tag("svg", edges, boxes, **size)


def _edge(parent: tuple[float, float], child: tuple[float, float]) -> Markup:
    (x1, y1), (x2, y2) = (parent[0] + _WIDTH, parent[1] + _HEIGHT / 2), (child[0], child[1] + _HEIGHT / 2)
    middle = (x1 + x2) / 2
    path = f"M {x1} {y1} C {middle} {y1}, {middle} {y2}, {x2} {y2}"
    return tag("path", d=path, fill="none", stroke="#94a3b8", stroke_width="1.3")


def _box(run: RunPage, name: str, x: float, y: float) -> Markup:
    stage = next((stage for stage in run.stages if stage.summary.name == name), None)
    box = {"x": str(x), "y": str(y), "width": str(_WIDTH), "height": str(_HEIGHT), "rx": "7", "fill": "#ffffff"}
    if stage is None:
        rect = tag("rect", **box, stroke="#94a3b8", stroke_dasharray="4 3")
        return Markup(
            rect + _text(x + 10, y + 21, _short(name), "600 13px") + _text(x + 10, y + 38, "another run", "11.5px")
        )
    summary = stage.summary
    colour = _EDGES[summary.state] if summary.state in _EDGES else _OTHER
    metric = ""
    if summary.key_metric is not None and isinstance(summary.key_metric[1], (int, float)):
        metric = f"{summary.key_metric[0]} {summary.key_metric[1]:.4g}"
    rect = tag("rect", **box, stroke=colour, stroke_width="1.6")
    below = _short(metric or summary.state, 30)
    inside = Markup(rect + _text(x + 10, y + 21, _short(name), "600 13px") + _text(x + 10, y + 38, below, "11.5px"))
    return tag("a", tag("title", f"{name}: {summary.state}"), inside, href=f"#{name}")


def _text(x: float, y: float, text: str, font: str) -> Markup:
    fill = "#0f172a" if font.startswith("600") else "#64748b"
    return tag("text", text, x=str(x), y=str(y), fill=fill, style=f"font: {font} system-ui, sans-serif")


def _short(text: str, most: int = 21) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
