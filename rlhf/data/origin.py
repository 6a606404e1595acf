"""Where the records of a dataset stand, by their numbers."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf.data.formats import Kind
from rlhf.data.records import read_records
from rlhf.data.report import SourceReport
from rlhf.data.sources import all_sources
from rlhf.recipe.schema import DataBlock


def origins(data: DataBlock, kind: Kind, numbers: Iterable[int]) -> dict[int, str]:
    """number -> file:line of these records, which examples have as `row`. The sources are read once more for it."""
    wanted, found, number = set(numbers), dict[int, str](), 0
    for key, source in all_sources(data):
        if len(found) == len(wanted):
            break
        for record in read_records(source, key, kind, SourceReport(key, str(source.path), "", "")):
            if number in wanted:
                found[number] = record.where
            number += 1
    return found
