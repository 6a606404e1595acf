"""Datasets that bring code or addresses along: nothing is run, opened or fetched."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk

from rlhf.data.sources import read_rows
from rlhf.errors import DataError, UnsafeError
from rlhf.recipe.schema import DataBlock

ROW = {"prompt": "a", "completion": "b"}


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def rows(path: Path) -> list[dict]:
    return [row for _, row in read_rows(DataBlock(path=str(path)), "data")]


def test_a_loading_script_is_not_run(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    for name in ("d.py", "__init__.py", "rows.py", "setup.py"):
        (tmp_path / "d" / name).write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})\n")
    assert rows(tmp_path / "d") == [ROW]
    (tmp_path / "d" / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="expected files that end in"):
        rows(tmp_path / "d")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "bin", "npy", "joblib"])
def test_pickled_files_are_no_data(tmp_path, suffix):
    (tmp_path / f"rows.{suffix}").write_bytes(pickle.dumps(Harmful(tmp_path / "mark")))
    for path in (tmp_path, tmp_path / f"rows.{suffix}"):
        with pytest.raises(DataError, match="that end"):
            rows(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_of_pickles_is_a_column_of_bytes(tmp_path, suffix):
    content = pickle.dumps(Harmful(tmp_path / "mark"))
    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "extra": [content]})
    write(table, tmp_path / f"rows.{suffix}")
    assert rows(tmp_path / f"rows.{suffix}") == [{**ROW, "extra": content}]
    assert not (tmp_path / "mark").exists()


def write(table: pyarrow.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("name", [b"arrow.py_extension_type", b"datasets.features.features.Array2DExtensionType", b"x"])
def test_an_extension_type_is_its_storage(tmp_path, suffix, name):
    """Older pyarrow unpickled what a type said of itself (CVE-2023-47248)."""
    facts = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": pickle.dumps(Harmful(tmp_path / "mark"))}
    field = pyarrow.field("extra", pyarrow.string(), metadata=facts)
    schema = pyarrow.schema(
        [pyarrow.field("prompt", pyarrow.string()), pyarrow.field("completion", pyarrow.string()), field]
    )
    write(pyarrow.table([["a"], ["b"], ["c"]], schema=schema), tmp_path / f"rows.{suffix}")
    if name.startswith(b"datasets"):  # a type that `datasets` knows, with a description that it cannot read
        with pytest.raises(DataError, match="found damage"):
            rows(tmp_path / f"rows.{suffix}")
    else:
        assert rows(tmp_path / f"rows.{suffix}") == [{**ROW, "extra": "c"}]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "value", ["http://127.0.0.1:9/a.png", "https://example.com/a.png", "/etc/hostname", "s3://a/b"]
)
def test_addresses_and_paths_in_columns_are_text(tmp_path, no_network, value):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "image": value}) + "\n")
    assert rows(tmp_path / "rows.jsonl") == [{**ROW, "image": value}]
    stored = {"bytes": None, "path": value}
    kept = Features({"prompt": Value("string"), "completion": Value("string")})
    kept["image"] = {"bytes": Value("binary"), "path": Value("string")}
    Dataset.from_list([{**ROW, "image": stored}], features=kept).save_to_disk(tmp_path / "saved")
    info = tmp_path / "saved" / "dataset_info.json"
    facts = json.loads(info.read_text())
    facts["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(facts))
    assert isinstance(load_from_disk(tmp_path / "saved").features["image"], Image)
    assert rows(tmp_path / "saved") == [{**ROW, "image": stored}]


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", 3])
def test_a_saved_dataset_names_no_file_elsewhere(tmp_path, name):
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UnsafeError, match="expected the name of a file in this folder"):
        rows(tmp_path / "saved")
