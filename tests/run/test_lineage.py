"""What a stage was made from."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UnsafeError
from rlhf.run import lineage
from rlhf.run.commit import write_json
from rlhf.run.lineage import Parent


def manifest(kind: str = "policy", sha: str = "aa") -> dict[str, Any]:
    return {"kind": kind, "files": {"model/b": {"size": 1, "sha256": sha}, "model/a": {"size": 2, "sha256": "bb"}}}


def test_a_tree_is_known_by_names_and_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "w.bin").write_bytes(b"\0" * 5_000_000)
    same = lineage.hash_tree(tmp_path / "a")
    assert same == lineage.hash_tree(tmp_path / "b")
    (tmp_path / "b" / "config.json").rename(tmp_path / "b" / "config2.json")
    assert same != lineage.hash_tree(tmp_path / "b")
    (tmp_path / "a" / "link").symlink_to("config.json")
    with pytest.raises(UnsafeError):
        lineage.hash_tree(tmp_path / "a")


def test_the_content_hash_is_of_kind_and_files_alone() -> None:
    first = manifest()
    other = {"published": 5, "kind": "policy", "files": dict(reversed(first["files"].items()))}
    assert lineage.content_hash(first) == lineage.content_hash(other)
    assert lineage.content_hash(first) != lineage.content_hash(manifest("reward"))
    assert lineage.content_hash(first) != lineage.content_hash(manifest(sha="cc"))


def test_differences_name_every_leaf_with_both_values() -> None:
    before = lineage.recordable(
        {"stage": "ppo", "recipe": {"train": {"lr": 1e-6, "steps": 5}, "data": {"sources": [{"path": "a"}]}, "old": 1}}
    )
    now = {
        "stage": "ppo",
        "recipe": {
            "train": {"lr": 1e-5, "steps": 5.0},
            "data": {"sources": [{"path": "b"}, {"path": "c"}]},
            "on": True,
        },
    }
    assert lineage.differences(before, now) == [
        "train.lr: 1e-06 before, 1e-05 now",
        "data.sources[0].path: 'a' before, 'b' now",
        "old: 1 before, not set now",
        "data.sources[1].path: not set before, 'c' now",
        "on: not set before, True now",
    ]


def test_equal_inputs_have_no_differences_whatever_their_form() -> None:
    inputs = {"betas": (0.9, 0.95), "path": Path("x"), "none": None, "nan": float("nan"), "empty": {}, "list": []}
    recorded = json.loads(json.dumps(lineage.recordable(inputs)))
    assert lineage.differences(recorded, inputs) == []
    assert lineage.differences({"a": 1}, {"a": True}) == ["a: 1 before, True now"]
    assert lineage.differences({"a": {}}, {"a": []}) == ["a: {} before, [] now"]


def test_long_values_are_shortened() -> None:
    (line,) = lineage.differences({"a": "x" * 500}, {"a": "y"})
    assert len(line) < 100


def test_credentials_in_addresses_are_never_recorded() -> None:
    value = {"argv": ["--set", "data.path=https://me:s3cret@host/x", "s3://bucket/a@b"]}
    assert lineage.recordable(value) == {"argv": ["--set", "data.path=https://***@host/x", "s3://bucket/a@b"]}
    assert lineage.differences(lineage.recordable(value), value) == []


def test_an_invocation_holds_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    facts = lineage.invocation(["cpu", "cpu"])
    assert "hf_canary" not in json.dumps(facts)
    assert facts["devices"] == ["cpu", "cpu"] and facts["argv"] and facts["python"].startswith("3.")
    assert facts["packages"]["pydantic"] and "no-such-package" not in facts["packages"]


def test_the_revision_of_the_repository_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lineage.git_revision(tmp_path) is None
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    found = lineage.git_revision(tmp_path)
    assert found is not None and len(found["revision"]) == 40 and found["changed"] is False
    (tmp_path / "a").write_text("2")
    found = lineage.git_revision(tmp_path)
    assert found is not None and found["changed"] is True
    monkeypatch.setenv("PATH", "/nonexistent")
    assert lineage.git_revision(tmp_path) is None


def stage(root: Path, name: str, published: dict[str, Any], *parents: Parent) -> Parent:
    """A published stage folder with the given manifest and parents."""
    (root / name).mkdir(parents=True)
    write_json(root / name / "MANIFEST.json", published)
    write_json(root / name / "provenance.json", {"parents": [p.record(root) for p in parents]})
    return Parent(root / name, published, lineage.content_hash(published))


def test_parents_and_staleness(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sft = stage(run, "sft", manifest())
    other = stage(tmp_path / "other", "rm", manifest("reward"))
    ppo = stage(run, "ppo", manifest(sha="dd"), sft, other)
    assert sft.record(run) == {"stage": "sft", "path": "sft", "kind": "policy", "content_hash": sft.content_hash}
    assert (sft.model, sft.critic) == (sft.path / "model", sft.path / "critic")
    assert lineage.graph([sft.path, ppo.path]) == {"sft": [], "ppo": ["sft", str(other.path)]}
    assert lineage.stale_parents(ppo.path) == []
    moved = run.rename(tmp_path / "moved")
    assert lineage.stale_parents(moved / "ppo") == []
    write_json(moved / "sft" / "MANIFEST.json", manifest(sha="new"))
    assert lineage.stale_parents(moved / "ppo") == ["sft"]
    (other.path / "MANIFEST.json").unlink()
    assert lineage.stale_parents(moved / "ppo") == ["sft", "rm"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"parents": 3}', '{"parents": [3, {"stage": "x"}]}'])
def test_damaged_provenance_has_no_parents(tmp_path: Path, content: str) -> None:
    (tmp_path / "provenance.json").write_text(content)
    assert lineage.recorded_parents(tmp_path) == [] and lineage.stale_parents(tmp_path) == []
