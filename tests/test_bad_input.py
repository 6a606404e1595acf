"""What a user can get wrong: one message with its place and remedy, the right exit code, no traceback, nothing written.

BAD, DATA and RUN in options and files stand for the case's own folder, the tiny run's data and its run directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlhf.run.lock import Lock

GOOD = '{"prompt": "hello", "completion": "world"}\n'
STRICT = """{% for m in messages %}{% if m.role == "system" %}{{ raise_exception("no system") }}{% endif %}\
{{ m.content }}{% if m.role == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}"""
ROW = '{"prompt": "the plot was", "answer": "4"}\n'


@dataclass(frozen=True)
class Case:
    """A command, what it must answer, and the files it is about."""

    stage: str
    options: str  # --set values, one per line
    code: int
    words: str  # regular expressions that the message must match, a line break between them
    files: dict[str, str | bytes] = field(default_factory=dict)


def rows(content: str | bytes, code: int, words: str, stage: str = "sft") -> Case:
    """A case about a data file."""
    return Case(stage, "data={path: BAD/rows.jsonl, max_length: 96}", code, words, {"rows.jsonl": content})


def reward(body: str, words: str) -> Case:
    """A case about a reward file that was allowed to run."""
    return Case("grpo", 'rewards=[{kind: function, function: "BAD/mine.py:score"}]', 2, words, {"mine.py": body})


# Refused before torch is imported.
EARLY = {
    # recipes
    "typo": Case("sft", "train.lrr=1", 2, r"train.lrr: expected a known key\ndid you mean train.lr\?"),
    "several problems": Case("sft", "train.lr=fast\nmodel.init.heads=3", 2, r"train.lr: expected a number\ndivisor"),
    "wrong type": Case("sft", "train.batch_size=many", 2, r"train.batch_size: expected a whole number >= 1"),
    "bf16 without its master weights": Case("sft", "model.dtype=bf16", 2, r"zero.stage: expected 1, 2 or 3.*bf16"),
    "frozen model at stage 1": Case("ppo", "reference.zero.stage=1", 2, r"expected 0 or 3 for a frozen model"),
    "group of one": Case(
        "grpo", "train.answers=1", 2, r"train.answers: expected at least 2 for advantage grpo, found 1\nneed no group"
    ),
    "minibatches": Case(
        "grpo", "train.minibatches=5", 2, r"divisor of prompts x answers = 8 x 4 = 32, found 5\none of 1"
    ),
    "rows over the context": Case("sft", "data.max_length=1000", 2, r"at most model.init.context = 128, found 1000"),
    "no room for prompts": Case("ppo", "sampling.max_new_tokens=200", 2, r"expected less than data.max_length = 96"),
    "no tracker": Case("sft", "log.wandb=mine", 2, r"log.wandb: expected the package wandb\npip install"),
    # data
    "missing file": Case(
        "sft", "data.path=DATA/stf.jsonl", 3, r"found nothing at .*stf.jsonl\ndid you mean .*sft.jsonl"
    ),
    "missing held-out file": Case("rm", "data.eval={path: BAD/no.jsonl}", 3, r"data.eval.path: expected a file"),
    "empty file": rows("", 3, r"rows.jsonl: expected rows, found an empty file\ndata.path"),
    "empty lines": rows("\n\n", 3, r"rows.jsonl: expected rows, found none"),
    "broken JSON": rows(GOOD * 2 + '{"prompt": "a", "compl\n', 3, r"rows.jsonl:3:17: expected JSON"),
    "other encoding": rows(GOOD.encode() + b'{"prompt": "caf\xe9"}\n', 3, r"rows.jsonl:2:16: expected UTF-8\niconv"),
    "no row": rows(GOOD + "[1, 2]\n", 3, r"rows.jsonl:2: expected a row as an object"),
    "missing column": rows(
        '{"question": "a"}\n', 3, r"rows.jsonl:1: columns: expected .*prompt.*found question\ncolumns"
    ),
    "column missing in a row": rows(
        GOOD * 2 + '{"prompt": "a"}\n', 3, r"rows.jsonl:3: completion: expected this column"
    ),
    "type of a column": rows(
        GOOD + '{"prompt": "a", "completion": 3}\n', 3, r"rows.jsonl:2: completion: expected text"
    ),
    "no pairs": rows(GOOD, 3, r"expected a better and a worse answer \(chosen, rejected\)", stage="rm"),
    "mapped column": Case(
        "sft", "data.columns={prompt: q}", 3, r"sft.jsonl:1: q: expected this column\ncolumns.prompt"
    ),
    "not a data file": Case("sft", "data.path=BAD/r.xlsx", 3, r"a file that ends in .jsonl", {"r.xlsx": "x"}),
    "no data in a folder": Case("sft", "data.path=BAD", 3, r"expected files that end in", {"notes.md": "x"}),
    "broken gzip": Case("sft", "data.path=BAD/r.jsonl.gz", 3, r"expected a whole gzip file", {"r.jsonl.gz": "x"}),
    "broken parquet": Case("sft", "data.path=BAD/r.parquet", 3, r"expected a Parquet file", {"r.parquet": "x"}),
    # parents
    "no parent": Case(
        "ppo", "model={from: sftt}", 4, r"found no folder .*sftt\nMake it with: rlhf sft RECIPE --run .* --name"
    ),
    "reward model as a policy": Case(
        "ppo", "model={from: rm}", 4, r"expected a policy, found a reward model\nName one of: sft"
    ),
    "policy as a reward model": Case(
        "ppo", "rewards=[{kind: model, from: sft}]", 4, r"expected a reward model, found a pol"
    ),
    "unfinished parent": Case("ppo", "model={from: halfway}", 4, r"halfway stopped at step 3 of 10\nMake it with"),
    "changed parent": Case(
        "ppo", "model={from: damaged}", 4, r"as it was published, found a change in .*config.json\nRestore"
    ),
    "parent elsewhere": Case("ppo", "model={from: ..}", 9, r"model.from: expected a stage name\nName a stage"),
    "other tokenizer of the critic": Case(
        "ppo", "critic={from: OTHER/rm}", 4, r"expected the tokenizer of .*sft, found\ncritic: \{from: sft\}"
    ),
    "other template of the critic": Case(
        "ppo", "critic={from: TEMPLATE/rm}", 4, r"expected the chat template of .*sft, found\ncritic: \{from: sft\}"
    ),
    "other tokenizer of the reference": Case(
        "grpo", "reference={from: OTHER/sft}", 4, r"expected the tokenizer of .*sft, found\nsame SFT stage"
    ),
    "policy as a test reward": Case(
        "ppo", "test_rewards=[{kind: model, from: sft}]", 4, r"expected a reward model, found a pol"
    ),
    # model folders
    "no model folder": Case(
        "sft", "model={path: BAD/no}", 4, r"BAD/no: expected a model folder, found nothing\nhub id"
    ),
    "stage folder as a model": Case(
        "sft", "model={path: RUN/sft}", 4, r"found no config.json in it\nName .*sft/model, or"
    ),
    "no weights": Case("sft", "model={path: BAD}", 4, r"expected weights", {"config.json": "{}"}),
    "pickles": Case("sft", "model={path: BAD}", 9, r"pickled weights only", {"config.json": "{}", "a.bin": ""}),
    "code": Case("sft", "model={path: BAD}", 9, r"found auto_map", {"config.json": '{"auto_map": {"a": "b"}}'}),
    "broken configuration": Case("sft", "model={path: BAD}", 4, r"config.json: expected JSON", {"config.json": "{"}),
    # rewards
    "no reward file": Case(
        "grpo", 'rewards=[{kind: function, function: "BAD/no.py:score"}]', 2, r"found nothing at .*no.py"
    ),
    "process reward that may not run": Case(
        "grpo",
        'test_rewards=[{kind: process, function: "BAD/steps.py:score"}]',
        9,
        r"expected steps.py to be allowed on the command line\n--allow-code",
        {"steps.py": "def score(rows, steps): pass"},
    ),
    "no process file": Case(
        "grpo", 'rewards=[{kind: process, function: "BAD/no.py:score"}]', 2, r"rewards.0.function.*nothing at .*no.py"
    ),
    "address of another kind": Case("grpo", "rewards=[{kind: http, url: 'file:///x'}]", 2, r"rewards.0.url: expected"),
    "no reward": Case("grpo", "rewards=[]", 2, r"rewards: expected a list of blocks of options, at least 1"),
    "broken pattern": Case(
        "grpo", "rewards=[{kind: format, pattern: '('}]", 2, r"rewards.0.pattern: expected a regular"
    ),
}

# Found by what needs a tokenizer or a configuration: the data or the models' folders were fine to look at.
LATE = {
    "all rows too long": Case(
        "sft", "data.max_length=8", 3, r"found none among 60: 60 longer than max_length\nrlhf show"
    ),
    "all answers empty": rows(GOOD.replace("world", "") * 3, 3, r"found none among 3: 3 empty answer"),
    "a row too long": Case(
        "sft", "data.max_length=20\ndata.on_long=error", 3, r"sft.jsonl:1: expected at most 20 tokens"
    ),
    "nothing left to train on": Case(
        "sft", "data.eval_rows=60", 3, r"data.eval_rows: expected more rows than are held out"
    ),
    "rows over a parent's context": Case(
        "ppo", "data.max_length=1000", 2, r"data.max_length: expected at most 128, the pos"
    ),
    "a prompt over the context": rows(
        json.dumps({"prompt": "and so on " * 400}) + "\n",
        3,
        r"found none among 1: 1 longer than max_length",
        stage="ppo",
    ),
    "no room for samples": Case("sft", "sampling.max_new_tokens=120", 2, r"sampling.max_new_tokens: expected at most"),
    "all by path": Case(
        "ppo",
        "model={path: OTHER/sft/model}",
        4,
        r"critic.from: expected the policy's tokenizer\ncritic: \{path: OTHER/sft/model\}",
    ),
    "reward model without statistics": Case(
        "grpo",
        "rewards=[{kind: length}, {kind: model, path: BARE, statistics: normalise}]",
        4,
        r"rewards.1.statistics: expected score_mean and score_std > 0 in BARE/config.json, found none\nrlhf rm",
    ),
    "reward model of another vocabulary without a template": Case(
        "grpo",
        "test_rewards=[{kind: model, path: BARE}]\nmodel={path: OTHER/sft/model}",
        4,
        r"test_rewards.0.path: expected the policy's tokenizer or a chat template\nchat_template.jinja",
    ),
    "prompts that a reward model's template does not take": Case(
        "grpo",
        "rewards=[{kind: model, path: STRICT}]\ndata={path: BAD/rows.jsonl, max_length: 96, system: Be brief.}",
        3,
        r"rewards.0: .*rows.jsonl:1: expected prompts that its chat template takes, system, user: no system",
        {"rows.jsonl": ROW * 3},
    ),
    "scorer that nobody runs": Case(
        "grpo",
        "rewards=[{kind: http, url: 'http://127.0.0.1:9/score'}]",
        8,
        r"rewards.0.url: expected a scorer that accepts connections\nStart it",
    ),
    "steps of something else": Case(
        "grpo",
        'rewards=[{kind: process, function: "BAD/mine.py:score"}]',
        2,
        r"expected a function of two lists, found score\(steps\)",
        {"mine.py": "def score(steps): pass\n"},
    ),
    "template changed": Case(
        "ppo", "model={from: sft, chat_template: chatml}", 4, r"critic.from: expected the policy's chat template"
    ),
    "reward model as a policy by path": Case(
        "sft", "model={path: RUN/rm/model}", 4, r"model.path: expected a policy, found a model with a score head"
    ),
    "policy as a reward model by path": Case(
        "ppo", "rewards=[{kind: model, path: RUN/sft/model}]", 4, r"rewards.0.path: expected a reward model, found"
    ),
    "stop text": Case("ppo", "sampling.stop=[two words]", 2, r"sampling.stop: expected a token of the vocabulary"),
    "no reference answer": Case(
        "grpo", "rewards=[{kind: numeric}]", 3, r"prompts.jsonl:1: expected a reference answer"
    ),
    "reference without a number": Case(
        "grpo",
        "rewards=[{kind: numeric}]\ndata={path: BAD/rows.jsonl, max_length: 96}",
        3,
        r"rows.jsonl:9: expected a number in column 'answer'",
        {"rows.jsonl": ROW * 8 + ROW.replace("4", "four")},
    ),
    "reward file that does not load": reward(
        "import no_such_module\n", r"mine.py: the file could not be loaded.*line 1"
    ),
    "reward file without the function": reward("def other(): pass\n", r"expected a function 'score', found other"),
    "reward function of something else": reward(
        "def score(answers): pass\n", r"expected a function of two lists, found score\(answers\)"
    ),
}

# Found while a reward runs, after the models were loaded.
RUNNING = {
    "reward that raises": reward("def score(rows, answers):\n    return 1 / 0\n", r"ZeroDivisionError.*line 2"),
    "reward with too few scores": reward(
        "def score(rows, answers):\n    return [1.0]\n", r"expected \d scores, found 1"
    ),
    "reward that takes too long": Case(
        "grpo",
        'rewards=[{kind: function, function: "BAD/mine.py:score", timeout: 0.2}]',
        2,
        r"within 0.2 s, found none \(line [23]\)\nraise `timeout`",
        {"mine.py": "def score(rows, answers):\n    while True:\n        pass\n"},
    ),
    "process reward with too few scores": Case(
        "grpo",
        'rewards=[{kind: process, function: "BAD/mine.py:score", separator: " "}]',
        2,
        r"expected \d+ step scores of answer 0, found 0",
        {"mine.py": "def score(rows, steps):\n    return [[] for _ in steps]\n"},
    ),
    "reward that ends the process": reward(
        "def score(rows, answers):\n    raise SystemExit(0)\n", r"raised SystemExit: 0"
    ),
}


@pytest.fixture(scope="module")
def world(cli, tiny, tmp_path_factory) -> dict[str, str]:
    """Runs to refer to: another vocabulary, another template; an unfinished and a damaged stage in the tiny run.

    BARE and STRICT are its reward model without statistics, and without a template or with a narrow one.
    """
    places = {"DATA": str(tiny.data), "RUN": str(tiny.root)}
    for name, option in (("OTHER", "model.init.vocab=350"), ("TEMPLATE", "model.chat_template=chatml")):
        root = tmp_path_factory.mktemp(name.lower())
        for command in (["sft", tiny.recipes / "sft.yaml", "--set", option], ["rm", tiny.recipes / "rm.yaml"]):
            done = cli(*command, "--run", root)
            assert done.code == 0, done.err
        places[name] = str(root)
    for name, template in (("BARE", None), ("STRICT", STRICT)):
        folder = tmp_path_factory.mktemp(name.lower()) / "model"
        shutil.copytree(tiny.root / "rm" / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in config.items() if not key.startswith("score_")}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        places[name] = str(folder)
    halfway = tiny.root / "halfway"
    halfway.mkdir()
    status = {"state": "stopped", "stage": "sft", "step": 3, "total_steps": 10}
    (halfway / "status.json").write_text(json.dumps(status))
    (halfway / "provenance.json").write_text('{"inputs": {}}')
    shutil.copytree(tiny.root / "sft", tiny.root / "damaged")
    (tiny.root / "damaged" / "model" / "config.json").write_text("{}")
    return places


def refused(tiny, run, code: int, words: str, *command: str | Path):
    """Run a command and hold its answer against what every bad input must get."""
    before = tiny.files()
    done = run(*command)
    assert done.code == code, done.err
    for part in words.split(r"\n"):
        assert re.search(part, done.err), f"{part!r} is not in:\n{done.err}"
    assert "Traceback" not in done.err and done.out == "", done.err + done.out
    assert tiny.files() == before, "something was written"
    return done


def check(tiny, run, world: dict[str, str], folder: Path, case: Case):
    """Run a case of the tables."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def filled(text: str) -> str:
        for word, place in {**world, "BAD": str(folder)}.items():
            text = text.replace(word, place)
        return text

    options: list[str | Path] = [word for line in filled(case.options).splitlines() for word in ("--set", line)]
    if "mine.py" in case.files:
        options += ["--allow-code", folder / "mine.py"]
    command = tiny.command(case.stage, "--name", "new", *options)
    done = refused(tiny, run, case.code, filled(case.words), *command)
    assert done.err.count("error: ") == 1
    return done


@pytest.mark.parametrize("name", EARLY)
def test_refused_without_torch(cold_cli, tiny, world, tmp_path, name):
    assert not check(tiny, cold_cli, world, tmp_path, EARLY[name]).torch


@pytest.mark.parametrize("name", LATE)
def test_refused_before_a_model_loads(cli, tiny, world, tmp_path, name):
    done = check(tiny, cli, world, tmp_path, LATE[name])
    assert "parameters" not in done.err, "a model was loaded"


@pytest.mark.parametrize("name", RUNNING)
def test_refused_while_running(cli, tiny, world, tmp_path, name):
    check(tiny, cli, world, tmp_path, RUNNING[name])


def test_a_reward_that_scores_nothing_is_a_numerics_error(cli, tiny, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(rows, answers):\n    return [None for _ in answers]\n")
    options = ["--set", f'rewards=[{{kind: function, function: "{mine}:score"}}]', "--allow-code", mine]
    done = cli(*tiny.command("grpo", "--name", "unscored", *options))
    assert done.code == 5 and "expected scores in rollout 1, found all 32 answers unscored" in done.err
    assert "Traceback" not in done.err and "[unscored]" not in done.out
    assert json.loads((tiny.root / "unscored" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("option", ["model={path: no-such/model}", "data={path: no-such/data, max_length: 96}"])
def test_a_hub_that_cannot_be_reached(cli, tiny, option):
    done = refused(
        tiny, cli, 8, r"no-such/\w+: the hub cannot be reached", *tiny.command("sft", "--set", option, "--name", "new")
    )
    assert done.err.count("error: ") == 1 and "parameters" not in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(cold_cli, tiny, tmp_path):
    secret = tmp_path / "rows.jsonl"
    secret.write_text(GOOD)
    secret.chmod(0)
    command = tiny.command("sft", "--name", "new", "--set", f"data={{path: {secret}, max_length: 96}}")
    refused(tiny, cold_cli, 3, "found no permission", *command)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(cold_cli, tiny, tmp_path):
    (tmp_path / "model").mkdir(0)
    for option in (f"model={{path: {tmp_path / 'model'}}}", f"data={{path: {tmp_path / 'model'}, max_length: 96}}"):
        refused(tiny, cold_cli, 7, "Permission denied", *tiny.command("sft", "--name", "new", "--set", option))


def test_a_path_that_cannot_be(cold_cli, tiny):
    refused(tiny, cold_cli, 7, r"aaa: File name too long\nName another path", "status", "a" * 300)


# --- the command line and the run directory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--name", "a/b"], 9, r"expected a stage name.*found 'a/b'\n--name"),
        (["--name", ".."], 9, "expected a stage name"),
        (["--name", ""], 9, "expected a stage name"),
        (["--name", "report"], 2, "a name that is not used for something else"),
        (["--name", "sft.old-1"], 2, "a name that is not used for something else"),
        (["--gpus", "3"], 2, r"train.batch_size: expected a multiple of the 3 devices, found 8\nfor example 6"),
        (["--gpus", "2", "--set", "train.batch_size=7"], 2, "expected a multiple of the 2 devices, found 7"),
        (["--gpus", "9999"], 2, r"--gpus: expected devices of this machine.*found 9999\n--hostfile"),
        (["--num-nodes", "2"], 2, r"--hostfile: expected a host file for 2 nodes, found none"),
        (["--hostfile", "no-such-file"], 2, r"--hostfile no-such-file: expected a host file"),
        (["--run", "recipes/demo/sft.yaml"], 2, "expected a folder, found a file"),
    ],
)
def test_options_that_cannot_be(cold_cli, tiny, options, code, words):
    name = [] if "--name" in options else ["--name", "new"]
    assert not refused(tiny, cold_cli, code, words, *tiny.command("sft", *name, *options)).torch


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", r"expected a line per node \(1\), found 0"),
        ("one slots=2\ntwo\n", r"hosts:2: expected `host slots=n`, found 'two'"),
        ("one slots=0\n", r"hosts:1: expected `host slots=n`, found 'one slots=0'"),
        ("one slots=2\ntwo slots=1 # half\n", r"expected a multiple of the 3 devices"),
    ],
)
def test_host_files(cold_cli, tiny, tmp_path, lines, words):
    (tmp_path / "hosts").write_text(lines)
    refused(tiny, cold_cli, 2, words, *tiny.command("sft", "--name", "new", "--hostfile", tmp_path / "hosts"))


def test_a_second_process_on_the_same_stage_is_refused_at_once(cold_cli, tiny):
    lock = Lock(tiny.root / ".new.lock")
    lock.acquire()
    try:
        words = rf"held by process {os.getpid()}\n--name"
        assert not refused(tiny, cold_cli, 6, words, *tiny.command("sft", "--name", "new")).torch
    finally:
        lock.release()


def test_a_mistake_under_restart_leaves_the_old_stage(cli, tiny):
    refused(tiny, cli, 3, "longer than max_length", *tiny.command("sft", "--restart", "--set", "data.max_length=8"))
    assert cli(*tiny.command("sft")).code == 0


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("stages: [{stage: sftt, recipe: R/sft.yaml}]", 2, r"stages.0.stage: expected one of\ndid you mean sft"),
        (
            "stages: [{stage: sft, recipe: R/stf.yaml}]",
            2,
            r"stages.0.recipe: expected a recipe\ndid you mean sft",
        ),
        ("stages: []", 2, "stages: expected a list"),
        (
            "stages: [{stage: sft, recipe: R/sft.yaml}, {stage: rm, recipe: R/rm.yaml, set: {train.lrr: 1}}]",
            2,
            r"train.lrr: expected a known key\nin .*pipeline.yaml, stage rm",
        ),
        (
            "stages: [{stage: sft, recipe: R/sft.yaml}, {stage: rm, recipe: R/rm.yaml, set: {data.path: no.csv}}]",
            3,
            r"expected a file, found nothing at no.csv\nstage rm",
        ),
    ],
)
def test_a_pipeline_is_checked_before_its_first_stage(cold_cli, tiny, tmp_path, text, code, words):
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(text.replace("R/", f"{tiny.recipes}/"))
    done = refused(tiny, cold_cli, code, words, "run", pipeline, "--run", tmp_path / "run")
    assert not done.torch and not (tmp_path / "run").exists()
