"""Finding sources, and refusing them before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf.data.examples import load_examples
from rlhf.data.sources import check_sources, fingerprint, locate, read_rows
from rlhf.errors import DataError, RecipeError, ServiceError, UnsafeError, UserError
from rlhf.recipe.schema import DataBlock, SourceBlock

Write = Callable[[str, Any], str]
ROW = {"prompt": "a", "completion": "b"}


def values(source: SourceBlock) -> list[Any]:
    return [row for _, row in read_rows(source, "data")]


def test_facts_of_a_file(write: Write) -> None:
    path = write("a.jsonl", [ROW])
    (facts,) = check_sources(DataBlock(path=path), "tokens")
    assert (facts.key, facts.path, facts.format, facts.columns) == (
        "data",
        path,
        "prompt_completion",
        ("prompt", "completion"),
    )


def test_every_source_is_checked_and_named(write: Write) -> None:
    good = SourceBlock(path=write("a.jsonl", [ROW]))
    bad = SourceBlock(path=write("b.jsonl", []))
    for data, key in (
        (DataBlock(sources=[good, bad]), "data.sources[1]"),
        (DataBlock(sources=[good], eval=bad), "data.eval"),
    ):
        with pytest.raises(DataError, match="expected rows, found an empty file") as caught:
            check_sources(data, "tokens")
        assert f"{key}.path" in str(caught.value)


def test_limit_and_folder_order(write: Write, tmp_path: Path) -> None:
    write("d/b.jsonl", [{"text": "2"}, {"text": "3"}])
    write("d/a.csv", "text\n1\n")
    write("d/README.md", "no data")
    write("d/.hidden.jsonl", "broken")
    assert [r["text"] for r in values(SourceBlock(path=str(tmp_path / "d")))] == ["1", "2", "3"]
    assert [r["text"] for r in values(SourceBlock(path=str(tmp_path / "d"), limit=2))] == ["1", "2"]


def test_files_named_after_splits_are_not_mixed(write: Write, tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test", "validation_0"):
        write(f"d/{name}.jsonl", [{"text": name}])
    folder = str(tmp_path / "d")
    assert [r["text"] for r in values(SourceBlock(path=folder))] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [r["text"] for r in values(SourceBlock(path=folder, split="test"))] == ["test"]
    assert [r["text"] for r in values(SourceBlock(path=folder, split="dev"))] == ["validation_0"]
    with pytest.raises(DataError, match="expected files of the split more, found"):
        values(SourceBlock(path=folder, split="more"))


def test_data_dir_is_a_sub_folder(write: Write, tmp_path: Path) -> None:
    write("d/harmless/train.jsonl", [{"text": "x"}])
    assert values(SourceBlock(path=str(tmp_path / "d"), data_dir="harmless")) == [{"text": "x"}]
    with pytest.raises(DataError, match="Did you mean .*harmless"):
        values(SourceBlock(path=str(tmp_path / "d"), data_dir="harmles"))


def test_save_to_disk_folders(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list([ROW, {**ROW, "completion": "c"}])
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "several")
    assert len(values(SourceBlock(path=str(tmp_path / "one")))) == 2
    assert values(SourceBlock(path=str(tmp_path / "several"), split="test")) == [{**ROW, "completion": "c"}]
    (facts,) = check_sources(DataBlock(path=str(tmp_path / "several")), "tokens")
    assert facts.format == "prompt_completion"
    with pytest.raises(DataError, match="expected the split dev, found train, test"):
        values(SourceBlock(path=str(tmp_path / "several"), split="dev"))


def test_fingerprints_follow_content_not_place(write: Write) -> None:
    def print_of(name: str, rows: list[Any]) -> str:
        source = SourceBlock(path=write(name, rows))
        return fingerprint(source, locate(source, "data"))

    assert print_of("a.jsonl", [ROW]) == print_of("b/c.jsonl", [ROW]) != print_of("a2.jsonl", [ROW, ROW])


def test_bad_paths(write: Write, tmp_path: Path) -> None:
    write("reviews.jsonl", [ROW])
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    write("wrong/notes.txt", "x")
    cases = {
        "review.jsonl": "expected a file, a folder or a hub id (owner/name), found nothing\n  Did you mean ",
        "missing/folder/a.jsonl": "found nothing",
        "wrong/notes.txt": "expected a file that ends in .jsonl, .json",
        "wrong": "found notes.txt",
        "empty": "found an empty folder",
        "pipe.jsonl": "expected a file, found something else",
        "a" * 300: "found nothing",
    }
    for name, message in cases.items():
        with pytest.raises(DataError) as caught:
            check_sources(DataBlock(path=str(tmp_path / name)), "tokens")
        assert message in str(caught.value) and str(tmp_path / name) in str(caught.value), str(caught.value)
        assert "It is named in data.path of the recipe." in str(caught.value)


def test_files_without_rows(write: Write) -> None:
    for name, content in (("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "text\n")):
        with pytest.raises(DataError, match="expected rows, found none"):
            check_sources(DataBlock(path=write(name, content)), "tokens")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(write: Write) -> None:
    path = write("a.jsonl", [ROW])
    os.chmod(path, 0)
    with pytest.raises(DataError, match="found no permission to"):
        check_sources(DataBlock(path=path), "tokens")


def test_options_that_a_path_has_no_use_for(write: Write) -> None:
    path = write("a.jsonl", [ROW])
    for option, value in (("name", "x"), ("revision", "x"), ("split", "test"), ("data_dir", "x")):
        with pytest.raises(RecipeError, match=f"data.{option}: expected a"):
            check_sources(DataBlock(**{"path": path, option: value}), "tokens")


def test_formats_that_a_stage_cannot_learn_from(write: Write) -> None:
    pairs = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = {"prompts": {"prompt": "a"}, "text": {"text": "a"}, "done": ROW, "label": {**ROW, "label": True}}
    paths = {name: write(f"{name}.jsonl", [row]) for name, row in {**rows, "pairs": pairs}.items()}
    for name, kind, message in (
        (
            "done",
            "pairs",
            "expected a better and a worse answer (chosen, rejected), found rows of the format prompt_comp",
        ),
        ("label", "pairs", "Set pair_labels: true"),
        ("prompts", "tokens", "expected answers to learn from, found rows of the format prompts"),
        ("text", "prompts", "expected prompts, found rows of the format text"),
    ):
        with pytest.raises(DataError) as caught:
            check_sources(DataBlock(path=paths[name]), kind)  # type: ignore[arg-type]
        assert message in str(caught.value)
    for name, kind in (("pairs", "tokens"), ("pairs", "prompts"), ("done", "prompts"), ("label", "tokens")):
        check_sources(DataBlock(path=paths[name]), kind)  # type: ignore[arg-type]


def test_checking_text_files_imports_no_heavy_library(write: Write) -> None:
    path = write("a.jsonl", [ROW])
    code = (
        "import sys; from rlhf.data.sources import check_sources; from rlhf.recipe.schema import DataBlock;"
        f"check_sources(DataBlock(path={path!r}), 'tokens');"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the hub -------------------------------------------------------------------------------------------------------


def test_hub_ids_are_not_contacted_by_the_check() -> None:
    (facts,) = check_sources(DataBlock(path="somebody/something"), "pairs")
    assert (facts.located.kind, facts.format) == ("hub", None)
    with pytest.raises(DataError, match="found nothing"):  # a bare name could mean one of the library's own builders
        check_sources(DataBlock(path="pandas"), "pairs")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (datasets.exceptions.DatasetNotFoundError("no such dataset"), DataError),
        (ValueError("Unknown split 'dev'"), DataError),
        (ConnectionError("offline"), ServiceError),
        (RuntimeError("Dataset scripts are no longer supported, but found evil.py"), UnsafeError),
    ],
)
def test_hub_failures_become_errors_with_exit_codes(
    raised: Exception, expected: type[UserError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, **options: Any) -> None:
        assert "trust_remote_code" not in options
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(expected) as caught:
        values(SourceBlock(path="somebody/something"))
    assert str(raised)[:20] in str(caught.value)


def test_hub_rows_are_read_with_all_options(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    asked: dict[str, Any] = {}

    def answer(path: str, **options: Any) -> datasets.Dataset:
        asked.update(options, path=path)
        return datasets.Dataset.from_list([ROW] * 3)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    data = DataBlock(path="a/b", name="c", data_dir="d", split="test", revision="e", limit=2)
    loaded = load_examples(data, plain, "tokens", 0)
    assert asked == {"path": "a/b", "name": "c", "data_dir": "d", "split": "test", "revision": "e"}
    assert len(loaded.train) == 2 and loaded.report.sources[0].fingerprint == "hub:a/b@e/c/d/test"


def test_python_in_a_dataset_folder_is_never_run(write: Write, tmp_path: Path) -> None:
    write("d/d.py", "raise SystemExit('ran')")
    write("d/a.jsonl", [ROW])
    write("d/b.pkl", b"\x80\x04cos\nsystem\n")
    assert values(SourceBlock(path=str(tmp_path / "d"))) == [ROW]


def test_the_embedded_task_is_a_source_of_its_own() -> None:
    source = SourceBlock(path="demo:pairs", limit=3)
    rows = list(read_rows(source, "data"))
    assert [where for where, _ in rows] == ["demo:pairs:1", "demo:pairs:2", "demo:pairs:3"]
    assert set(rows[0][1]) == {"prompt", "chosen", "rejected"}
    [facts] = check_sources(DataBlock(path="demo:pairs"), "pairs")
    assert facts.format == "pairs"
    prompts = locate(SourceBlock(path="demo:prompts"), "data")
    assert fingerprint(source, facts.located) != fingerprint(SourceBlock(path="demo:prompts"), prompts)
    with pytest.raises(DataError, match="expected one of demo:sft, .*found demo:pears"):
        locate(SourceBlock(path="demo:pears"), "data")


def test_a_part_without_rows_and_a_home_of_nobody(write: Write) -> None:
    with pytest.raises(DataError, match="expected rows in part 2/2, found none"):
        check_sources(DataBlock(path=write("a.jsonl", [ROW]), part="2/2"), "tokens")
    with pytest.raises(DataError, match="~nobody-at-all/a.jsonl: expected a file, .*found nothing"):
        check_sources(DataBlock(path="~nobody-at-all/a.jsonl"), "tokens")
