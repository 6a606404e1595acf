"""Examples as columns of an Arrow file: written once, then mapped into memory and made into objects row by row.

The file is an Arrow stream, which `datasets.Dataset.from_file` opens too. A field of tokens or of masks is a column of
lists, a number a plain column. Python holds nothing per row, and the pages of a mapped file belong to the system: every
rank of a machine shares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from rlhf.data.examples import AnswerExample, Example, PairExample, TokenExample

KINDS = {kind.__name__: kind for kind in (TokenExample, PairExample, AnswerExample)}
# A field's annotation -> the type of its values in the file, and whether a row has a list of them.
_STORED: dict[str, tuple[Any, bool]] = {
    "Ids": (np.int32, True),
    "Mask": (np.uint8, True),  # Arrow's own booleans are packed into bits, which numpy cannot look at in place
    "tuple[float, float] | None": (np.float64, True),  # an empty list is None
    "int": (np.int64, False),
    "float": (np.float64, False),
    "bool": (np.uint8, False),
}


def can_store(examples: Sequence[Any]) -> bool:
    """Whether all are of one kind that has columns. Prompts do not: their rows carry whatever a reward may ask for."""
    return len({type(example) for example in examples}) == 1 and type(examples[0]).__name__ in KINDS


def write_examples(path: Path, examples: Sequence[Any]) -> None:
    """Write examples of one kind; `StoredExamples(path)` gives equal ones back."""
    import pyarrow  # imported here: stages that read no such file do without it
    import pyarrow.ipc

    kind = type(examples[0])
    columns = {}
    for field in fields(kind):
        dtype, is_list = _STORED[str(field.type)]
        values = [getattr(example, field.name) for example in examples]
        if is_list:
            values = [() if value is None else value for value in values]
            ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
            flat = pyarrow.array(np.concatenate([np.asarray(value, dtype) for value in values]))
            columns[field.name] = pyarrow.LargeListArray.from_arrays(ends, flat)
        else:
            columns[field.name] = pyarrow.array(np.array(values, dtype))
    table = pyarrow.table(columns).replace_schema_metadata({"kind": kind.__name__})
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table)  # one batch: every column lies in one piece


class StoredExamples(Sequence[Example]):
    """The examples of a file that `write_examples` wrote. Each access makes the object anew, on arrays of the file."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.ipc

        with pyarrow.memory_map(str(path)) as file:
            self._table = pyarrow.ipc.open_stream(file).read_all()
        self._kind = KINDS[self._table.schema.metadata[b"kind"].decode()]
        self._read = [self._reader(field.name, str(field.type)) for field in fields(self._kind)]

    def _reader(self, name: str, stored: str) -> Callable[[int], Any]:
        """Row number -> the value of a field."""
        (chunk,) = self._table.column(name).chunks
        if not _STORED[stored][1]:
            numbers = chunk.to_numpy()
            as_python = {"int": int, "float": float, "bool": bool}[stored]
            return lambda row: as_python(numbers[row])
        ends, flat = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        if stored == "Mask":
            flat = flat.view(np.bool_)
        if stored in ("Ids", "Mask"):
            return lambda row: flat[ends[row] : ends[row + 1]]
        return lambda row: tuple(flat[ends[row] : ends[row + 1]].tolist()) or None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        return self._kind(*(read(row) for read in self._read))

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))
