"""Sources -> records: every row read, mapped and converted. Without a tokenizer: neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.data.filters import needs_margin, score_margin
from rlhf.data.formats import Kind, Record, convert, detect, require
from rlhf.data.mapping import Mapping
from rlhf.data.report import SourceReport
from rlhf.data.reshape import as_answers, as_lists, pair_up
from rlhf.data.sources import all_sources, locate, read_rows
from rlhf.recipe.schema import DataBlock, SourceBlock


def read_records(source: SourceBlock, key: str, kind: Kind, report: SourceReport) -> Iterator[Record]:
    """The records of a source, good and unusable ones; rows are counted in `report`, which is given the format."""
    mapping = Mapping(source, key)

    def records() -> Iterator[Record]:
        for where, raw in read_rows(source, key):
            row = mapping(where, raw)
            if not report.format:
                report.format = detect(row, where, source, key)
                require(report.format, kind, where, source)
            report.read += 1
            yield convert(row, where, report.format, source)

    if kind == "answers":
        return as_answers(records())
    if kind == "lists":
        return as_lists(records())
    if kind == "pairs" and source.pair_labels:
        return pair_up(records(), report.dropped)
    return records()


def check_records(data: DataBlock, kind: Kind) -> None:
    """Read all local rows once, so that a bad one is told before a model is loaded or a rank is started.

    Raises the DataError that training would end with. What only a tokenizer can tell (lengths) is left to training.
    """
    for key, source in all_sources(data):
        if locate(source, key).kind == "hub":
            continue
        is_measured = needs_margin(data) and key != f"{data.key}.eval"
        for record in read_records(source, key, kind, SourceReport(key, str(source.path), "", "")):
            if is_measured and not record.problem:
                score_margin(record)
