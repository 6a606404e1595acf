"""Nothing that a run reads as a file may run code: checkpoints, models, data."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rlhf.cli.floors import FLOORS, refuse_old
from rlhf.errors import UnsafeError
from rlhf.models.trust import code_hash
from rlhf.run.commit import MANIFEST, checkpoint_dirs, sealed
from rlhf.run.content import hash_file
from scripts.reliability.escapes import only_loopback
from scripts.reliability.evil import TRICKS, Harmful
from scripts.reliability.lab import Lab
from scripts.reliability.refusals import INTEGRITY, SAFE, refused, shuffled
from scripts.reliability.row import Tally, row


def remade(folder: Path) -> None:
    """Make a manifest match what is in its folder now, as anybody can who can write there."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


# --- S1 ---------------------------------------------------------------------------------------------------------------


@row(
    "S1",
    "a call planted in every file of a checkpoint and of a published model, the manifest made to match",
    expected="exit 9 (or 4 where the file is no longer one); the call never happens",
    asked="each file kind",
    quick=3,
    full=55,
)
def code_in_files(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: files planted, of all pairs of file and trick."""
    name, mark = "s1-ppo", lab.work / "s1-mark"
    words = lab.command("ppo", "--name", name, "--set", "zero.stage=1", "--set", "ema={decay: 0.5}")
    child = lab.start(words)
    assert child.until(lambda: len(checkpoint_dirs(lab.root / name / "checkpoints")) >= 2), child.text("err")
    child.kill()
    child.wait()
    kept = lab.work / "s1-kept"
    shutil.copytree(lab.root / name, kept)
    newest = checkpoint_dirs(kept / "checkpoints")[-1].relative_to(kept)
    files = sorted(path.relative_to(kept) for path in (kept / newest).rglob("*") if path.is_file())
    pickled = [(file, trick) for file in files if file.suffix == ".pt" for trick in TRICKS]
    others = [(file, "bare") for file in files if file.suffix != ".pt" and file.name != MANIFEST]
    parent = [(Path("..", "s1-sft", "model", file.name), "bare") for file in (lab.root / "sft" / "model").iterdir()]
    pairs = shuffled(pickled, seed)
    pairs = (
        [*pairs[: max(1, tries - len(others) - len(parent))], *others, *parent][:tries]
        if tries > 20
        else [pickled[0], *others[:1], *parent[:1], *pairs[: tries - 3]]
    )
    for file, trick in pairs:
        with tally.attempt(f"{trick} in {file}"):
            lab.clear(name)
            shutil.copytree(kept, lab.root / name)
            again = words
            if file.parts[0] == "..":
                lab.clear("s1-sft")
                shutil.copytree(lab.root / "sft", lab.root / "s1-sft")
                again = lab.command("dpo", "--name", "s1-dpo", "--set", "model={from: s1-sft}")
            target = (lab.root / name / file).resolve()
            TRICKS[trick](target, mark)
            remade(lab.root / "s1-sft" if file.parts[0] == ".." else lab.root / name / newest)
            ignored = file.suffix == ".py" or file.name == "generation_config.json"  # left unread, or read as absent
            refused(lab.run(again), mark, (0,) if ignored else (SAFE, INTEGRITY))
        shutil.rmtree(mark, ignore_errors=True)
    for each in (name, "s1-sft", "s1-dpo"):
        lab.clear(each)
    shutil.rmtree(kept)


# --- S2, S3 -----------------------------------------------------------------------------------------------------------


@row(
    "S2",
    "versions of torch, transformers and Jinja that are known to run code from data",
    expected="refused, exit 9; the floors themselves and newer ones are not",
    asked="floor pinned",
    quick=30,
    full=300,
)
def old_versions(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: drawn versions, older, equal and newer."""
    draw = random.Random(seed)
    for _ in range(tries):
        name = draw.choice(sorted(FLOORS))
        least = FLOORS[name][0]
        version = tuple(max(0, part + draw.choice((-1, 0, 0, 1))) for part in least)
        text = ".".join(map(str, version)) + draw.choice(("", "+cpu", ".post1"))
        with tally.attempt(f"{name} {text}"):
            try:
                refuse_old({name: text})
                is_refused = False
            except UnsafeError:
                is_refused = True
            assert is_refused == (version < least), f"refused: {is_refused}"


@row(
    "S3",
    "a model folder with code of its own: without trust, with trust in other code, by recipe keys",
    expected="exit 9 (2 for a key that no recipe has); the code is not imported",
    asked="auto_map + marker",
    quick=3,
    full=10,
)
def models_with_code(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: ways to ask for it."""
    mark, folder = lab.work / "s3-mark", lab.work / "s3-model"
    shutil.copytree(lab.root / "sft" / "model", folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    plain = {name: json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
    here = ["--set", f"model={{path: {folder}}}"]
    other = ["--trust-code", f"{folder}@{'0' * 64}"]
    elsewhere = ["--trust-code", f"{lab.work}@{code_hash(lab.work / 's3-model')}"]
    ways: list[tuple[str, dict[str, Any], list[str], int]] = [
        ("config.json", {"AutoConfig": "own.A"}, here, SAFE),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.A", None]}, here, SAFE),
        ("config.json", {"AutoModelForCausalLM": "own.A"}, [*here, *other], SAFE),
        ("config.json", {"AutoConfig": "own.A"}, [*here, *elsewhere], SAFE),
        ("config.json", {"AutoConfig": "a/b--own.A"}, here, SAFE),
        ("config.json", {"AutoConfig": "own.A"}, [*here, "--set", "model.trust_remote_code=true"], 2),
        ("config.json", {"AutoConfig": "own.A"}, [*here, "--trust-code", str(folder)], 2),
        ("config.json", {"AutoConfig": "own.A"}, [*here, "--trust-code", f"{folder}@main"], 2),
        ("config.json", {"AutoConfig": "own.A"}, ["--set", f"reference={{path: {folder}}}"], SAFE),
        ("tokenizer_config.json", {"AutoTokenizer": "own.A"}, ["--set", f"reference={{path: {folder}}}"], SAFE),
    ]
    for name, asked, options, code in ways[:tries]:
        for file, config in plain.items():
            (folder / file).write_text(json.dumps({**config, "auto_map": asked} if file == name else config))
        with tally.attempt(f"{name} {asked} {' '.join(options)}"):
            refused(lab.run(lab.command("dpo", "--name", "s3", *options)), mark, (code,))
            assert not (lab.root / "s3").exists()
    shutil.rmtree(folder)


# --- S6 ---------------------------------------------------------------------------------------------------------------


@row(
    "S6",
    "data folders with loading scripts, pickles, columns of pickles, types that describe themselves, addresses",
    expected="read as data, or exit 3; nothing is run or fetched",
    asked="each kind",
    quick=2,
    full=9,
)
def hostile_data(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: of all kinds."""
    mark = lab.work / "s6-mark"
    content = pickle.dumps(Harmful(mark))
    rows = {"prompt": ["the plot was"] * 24, "completion": ["fine"] * 24}
    described = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": content}

    def lines(**more: object) -> str:
        return (json.dumps({"prompt": "the plot was", "completion": "fine", **more}) + "\n") * 24

    def parquet(path: Path, column: list[Any], metadata: dict[bytes, bytes] | None) -> None:
        fields = [pyarrow.field(name, pyarrow.string()) for name in rows]
        kind = pyarrow.binary() if isinstance(column[0], bytes) else pyarrow.string()
        schema = pyarrow.schema([*fields, pyarrow.field("extra", kind, metadata=metadata)])
        pyarrow.parquet.write_table(pyarrow.table([*rows.values(), column], schema=schema), path)

    def script(folder: Path, name: str) -> None:
        (folder / name).write_text(f"import os\nos.mkdir({str(mark)!r})\n")

    kinds = [
        ("a loading script", lambda f: ((f / "r.jsonl").write_text(lines()), script(f, f"{f.name}.py")), 0),
        ("an address in a column", lambda f: (f / "r.jsonl").write_text(lines(image="http://192.0.2.1/a.png")), 0),
        ("a column of pickles", lambda f: parquet(f / "r.parquet", [content] * 24, None), 0),
        ("an extension type", lambda f: parquet(f / "r.parquet", ["x"] * 24, described), 0),
        ("a script alone", lambda f: script(f, f"{f.name}.py"), 3),
        *((f"rows.{end}", lambda f, end=end: (f / f"rows.{end}").write_bytes(content), 3) for end in ("pkl", "pt")),
        ("a pickle called Parquet", lambda f: (f / "r.parquet").write_bytes(content), 3),
        ("a pickle called Arrow", lambda f: (f / "r.arrow").write_bytes(content), 3),
    ]
    for what, make, code in kinds[:tries]:
        folder = lab.work / "s6data"
        folder.mkdir()
        make(folder)
        with tally.attempt(what):
            options = ["--set", f"data={{path: {folder}, max_length: 128, eval_rows: 4}}", "--set", "train.steps=1"]
            done = lab.run(lab.command("sft", "--name", "s6", *options), before=only_loopback)
            refused(done, mark, (code,))
        lab.clear("s6")
        shutil.rmtree(folder)
