"""Where rows come from: files, folders of files, `save_to_disk` folders and hub ids -> raw rows with their places.

Everything that can be known without a model is checked here, before one is loaded; neither torch nor transformers is
imported. Code is never run from a dataset: loading scripts and pickles are not read.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.data.demo import demo_rows
from rlhf.data.formats import Kind, detect, require
from rlhf.data.mapping import Mapping
from rlhf.data.readers import SUFFIXES, Row, check_arrow, read_file, suffix_of
from rlhf.data.shifts import SHIFTS, shift_rows
from rlhf.errors import DataError, RecipeError, ServiceError, UnsafeError
from rlhf.recipe.schema import DataBlock, SourceBlock

DEMO = "demo:"  # rows that are generated on the spot, see rlhf/data/demo.py and shifts.py
DEMO_NAMES = (
    "sft",
    "pairs",
    "lists",
    "prompts",
    "judgements",
    "eval_prompts",
    "eval_pairs",
    "eval_lists",
    "eval_judgements",
    *SHIFTS,
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves beside the data
_SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
}


@dataclass(frozen=True)
class Located:
    """What a source's path stands for."""

    kind: Literal["files", "saved", "hub", "demo"]
    files: tuple[Path, ...] = ()  # in reading order; of a saved dataset: all its files
    folder: Path | None = None


@dataclass(frozen=True)
class SourceFacts:
    """What the cheap check of a source found out."""

    key: str  # its place in the recipe: data, data.sources[1], data.eval
    path: str
    located: Located
    format: str | None  # None: only known after downloading
    columns: tuple[str, ...]


def named_sources(data: DataBlock) -> list[tuple[str, SourceBlock]]:
    """The training sources with their keys in the recipe."""
    if not data.sources:
        return [(data.key, data.all_sources()[0])]
    return [(f"{data.key}.sources[{i}]", source) for i, source in enumerate(data.sources)]


def all_sources(data: DataBlock) -> list[tuple[str, SourceBlock]]:
    """The same, and the held-out source if there is one."""
    held_out = [] if data.eval is None else [(f"{data.key}.eval", data.eval)]
    return [*named_sources(data), *held_out]


def check_sources(data: DataBlock, kind: Kind) -> list[SourceFacts]:
    """Look at every source's files and first row: do they exist, can they be read, do they hold what the stage needs?

    Raises the DataError or RecipeError that training would end with. Sources on the hub are not contacted.
    """
    return [_check(source, key, kind) for key, source in all_sources(data)]


def _check(source: SourceBlock, key: str, kind: Kind) -> SourceFacts:
    located = locate(source, key)
    mapping = Mapping(source, key)
    if located.kind == "hub":
        return SourceFacts(key, str(source.path), located, None, ())
    where, row = first_row(source, key)
    found = detect(mapping(where, row), where, source, key)
    require(found, kind, where, source)
    return SourceFacts(key, str(source.path), located, found, tuple(row))


def first_row(source: SourceBlock, key: str) -> Row:
    """The first row that a stage reads of a source; there may be none in a part of few rows."""
    row = next(read_rows(source, key), None)
    if row is None:
        raise DataError(f"expected rows in part {source.part}, found none", where=str(source.path), fix=_named(key))
    return row


def _demo_name(source: SourceBlock) -> str:
    return str(source.path).removeprefix(DEMO)


@functools.cache
def _demo_rows(name: str) -> list[dict[str, Any]]:
    return list(shift_rows(name)) if name in SHIFTS else demo_rows(name)


def fingerprint(source: SourceBlock, located: Located) -> str:
    """A source's identity: SHA-256 over the bytes of its files; of a hub id: its name, revision and split."""
    if located.kind == "hub":
        return f"hub:{source.path}@{source.revision or 'main'}/{source.name}/{source.data_dir}/{source.split}"
    digest = hashlib.sha256()
    if located.kind == "demo":
        digest.update(json.dumps(_demo_rows(_demo_name(source))).encode())
    for path in located.files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- finding -------------------------------------------------------------------------------------------------------


def locate(source: SourceBlock, key: str) -> Located:
    """Find a source's files, or decide that it is a hub id."""
    if not source.path:
        raise RecipeError("expected a file, folder or hub id, found none", where=f"{key}.path")
    if source.path.startswith(DEMO):
        if _demo_name(source) not in DEMO_NAMES:
            names = ", ".join(DEMO + name for name in DEMO_NAMES)
            raise DataError(f"expected one of {names}, found {source.path}", where=f"{key}.path")
        return Located("demo")
    path = Path(os.path.expanduser(source.path))
    if not os.path.exists(path):
        if _HUB_ID.fullmatch(source.path) and suffix_of(path) is None:
            return Located("hub")
        raise _missing(path, key)
    for option in ("name", "revision"):
        if getattr(source, option) is not None:
            raise RecipeError(f"expected a hub id where {option} is given, found a local path", where=f"{key}.{option}")
    if path.is_dir():
        return _folder(path / source.data_dir if source.data_dir else path, source, key)
    if source.split != "train" or source.data_dir is not None:
        option = "data_dir" if source.data_dir is not None else "split"
        raise RecipeError(f"expected a folder or hub id where {option} is given, found a file", where=f"{key}.{option}")
    if suffix_of(path) is None:
        raise DataError(f"expected a file that ends in {_or(SUFFIXES)}", where=str(path), fix=_named(key))
    return Located("files", (_readable(path, key),))


def _folder(folder: Path, source: SourceBlock, key: str) -> Located:
    if not folder.is_dir():
        raise _missing(folder, key)
    if any((folder / name).is_file() for name in _SAVED):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return Located("saved", tuple(_readable(path, key) for path in files), folder)
    files = sorted(p for p in folder.iterdir() if suffix_of(p) and not p.name.startswith((".", "_")))
    if not files:
        inside = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())[:6]
        raise DataError(
            f"expected files that end in {_or(SUFFIXES)}, found {', '.join(inside) if inside else 'an empty folder'}",
            where=str(folder),
            fix=f"Name a file or a folder that holds some, or its sub-folder in {key}.data_dir. {_named(key)}",
        )
    chosen = _of_split(files, source.split, key)
    return Located("files", tuple(_readable(path, key) for path in chosen), folder)


def _of_split(files: list[Path], split: str, key: str) -> list[Path]:
    """Files named after splits (train-00000.parquet, test.jsonl) are read by split, all files where none is."""
    splits = {path: split_of(path) for path in files}
    if not any(splits.values()):
        if split != "train":
            raise RecipeError(
                f"expected a folder with files named after their split, found {files[0].name}", where=f"{key}.split"
            )
        return files
    wanted = next((name for name, words in _SPLITS.items() if split in words), split)
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen:
        raise DataError(
            f"expected files of the split {split}, found {', '.join(path.name for path in files[:6])}",
            where=str(files[0].parent),
            fix=f"Change {key}.split, or name one file in {key}.path.",
        )
    return chosen


def split_of(path: Path) -> str | None:
    """The split that a file is named after, None where it is not."""
    word = re.split(r"[-_.]", path.name.lower())[0]
    return next((name for name, words in _SPLITS.items() if word in words), None)


def _readable(path: Path, key: str) -> Path:
    if not path.is_file():
        raise DataError("expected a file, found something else", where=str(path), fix=_named(key))
    if not os.access(path, os.R_OK):
        raise DataError("expected a file that can be read, found no permission to", where=str(path), fix=_named(key))
    if path.stat().st_size == 0 and suffix_of(path):
        raise DataError("expected rows, found an empty file", where=str(path), fix=_named(key))
    return path


def _missing(path: Path, key: str) -> DataError:
    folder = next(parent for parent in (*path.parents, Path("/")) if os.path.exists(parent))
    names = [p.name for p in folder.iterdir()] if folder.is_dir() and os.access(folder, os.R_OK) else []
    first = path.relative_to(folder).parts[0] if folder in path.parents else path.name
    near = difflib.get_close_matches(first, names, n=1)
    hint = f"Did you mean {folder / near[0]}? " if near else ""
    return DataError(
        "expected a file, a folder or a hub id (owner/name), found nothing", where=str(path), fix=hint + _named(key)
    )


def _named(key: str) -> str:
    return f"It is named in {key}.path of the recipe."


def _or(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"


# --- reading -------------------------------------------------------------------------------------------------------


def read_rows(source: SourceBlock, key: str) -> Iterator[Row]:
    """The rows of a source as they stand in its files: its `part` of them, at most `limit`."""
    located = locate(source, key)
    rows: Iterable[Row]
    if located.kind == "files":
        rows = itertools.chain.from_iterable(map(read_file, located.files))
    elif located.kind == "demo":
        rows = ((f"{source.path}:{number}", row) for number, row in enumerate(_demo_rows(_demo_name(source)), start=1))
    else:
        dataset = _load_saved(source, located) if located.kind == "saved" else _load_hub(source, key)
        rows = ((f"{source.path}:row {number}", row) for number, row in enumerate(_stored(dataset), start=1))
    first = next(iter(rows := iter(rows)), None)
    if first is None:
        raise DataError("expected rows, found none", where=str(source.path), fix=_named(key))
    number, parts = part_of(source)
    part = itertools.islice(itertools.chain([first], rows), number, None, parts)
    yield from itertools.islice(part, source.limit)


def part_of(source: SourceBlock) -> tuple[int, int]:
    """(which row of every so many is read, counted from 0, and how many that is)."""
    if source.part is None:
        return 0, 1
    number, _, parts = source.part.partition("/")
    return int(number) - 1, int(parts)


def _stored(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows as they are stored. Decoding them would open, or fetch, whatever an image or audio column names."""
    for batch in dataset.with_format("arrow").iter(1000):
        yield from batch.to_pylist()


def _refuse_other_files(located: Located) -> None:
    """What `save_to_disk` leaves names the data's files; they are in its own folder."""
    for path in located.files:
        if path.name == "state.json":
            try:
                named = [each["filename"] for each in json.loads(path.read_bytes())["_data_files"]]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"expected a list of data files, found: {_short(error)}", where=str(path)) from error
            for name in named:
                if not isinstance(name, str) or Path(name).name != name:
                    what = f"expected the name of a file in this folder, found {name!r}"
                    raise UnsafeError(what, where=str(path), fix="Save the dataset again.")


def _load_saved(source: SourceBlock, located: Located) -> Any:
    # Imported here: it takes a second, which sources that are plain files should not pay.
    import datasets

    _refuse_other_files(located)
    for path in located.files:
        if path.suffix == ".arrow":
            check_arrow(path)
    try:
        dataset = datasets.load_from_disk(str(located.folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"expected a save_to_disk folder, found: {_short(error)}", where=str(located.folder)) from error
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise DataError(f"expected the split {source.split}, found {', '.join(dataset)}", where=str(located.folder))
        dataset = dataset[source.split]
    return dataset


def _load_hub(source: SourceBlock, key: str) -> Any:
    import datasets  # here for the same reason

    try:
        return datasets.load_dataset(
            source.path, name=source.name, data_dir=source.data_dir, split=source.split, revision=source.revision
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"expected a file, a folder or a public dataset of the hub, found neither: {_short(error)}",
            where=str(source.path),
            fix=_named(key),
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # an unknown configuration or split, broken files
        raise DataError(f"cannot be read: {_short(error)}", where=str(source.path), fix=_named(key)) from error
    except RuntimeError as error:  # what `datasets` answers to a repository that brings its own Python
        if "script" not in str(error):
            raise
        raise UnsafeError(
            f"refused to run the dataset's own code: {_short(error)}",
            where=str(source.path),
            fix="Use a revision or a copy of it that holds Parquet, JSON or CSV files.",
        ) from error
    except OSError as error:  # network errors are among them
        raise ServiceError(
            f"the hub cannot be reached: {_short(error)}",
            where=str(source.path),
            fix=f"Try again, or download the files and name their folder in {key}.path.",
        ) from error


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
