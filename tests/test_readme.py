"""What README, docs and the recipes' READMEs tell a reader to type, to open and to look up is there and works.

Commands run in a folder with stand-ins for the reader's data and finished stages: those of stages with --dry-run, the
others as they are, where they need no model; the rest is parsed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rlhf import errors
from rlhf.cli.app import STAGES, app
from rlhf.errors import UserError
from rlhf.recipe.fields import walk
from rlhf.recipe.load import load_recipe
from rlhf.recipe.stages import RECIPES
from rlhf.rewards.rules import user_function
from rlhf.run.rundir import RunDir

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
TASKS = ("demo", "hh", "gsm8k", "reviews", "instruct")
REAL = ("status", "explain", "schema")  # commands that need neither a model nor trained weights

ROWS = {
    "pairs.jsonl": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "problems.jsonl": {"question": "1 + 1?", "answer": "It is #### 2"},
    "reviews.jsonl": {"text": "a fine film about pears and more", "label": 1},
    "alpaca.json": {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
    "preferences.json": {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- what a page holds ------------------------------------------------------------------------------------------------


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The code spans of a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def typed(page: Path) -> Iterator[list[str]]:
    """Every command line of a page, as words, without comments, pipes and redirections."""
    for language, text in fences(page):
        for line in text.splitlines() if not language else ():
            words = shlex.split(line.removeprefix("$ "), comments=True) if is_command(line) else []
            end = next((i for i, word in enumerate(words) if word in ("|", ">")), len(words))
            if words:
                yield words[:end]


def is_command(line: str) -> bool:
    return line.removeprefix("$ ").startswith(("rlhf ", "make ", "deepspeed ", "sbatch "))


def rlhf_words(words: list[str]) -> list[str] | None:
    """The part of a command line that `rlhf` gets, through whatever starts it."""
    before = {"rlhf": "rlhf", "deepspeed": "rlhf", "sbatch": "scripts/slurm.sh"}.get(words[0])
    return words[words.index(before) + 1 :] if before else None


RLHF = [pytest.param(p, w, id=f"{name(p)}: {' '.join(w)}") for p in PAGES for x in typed(p) if (w := rlhf_words(x))]
MAKE = [pytest.param(w, id=f"{name(p)}: {' '.join(w)}") for p in PAGES for w in typed(p) if w[0] == "make"]


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder like the reader's: the project's recipes, data of his own, and finished stages."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(ROOT / "scripts" / "hosts.example", folder / "hosts")
    for file, row in ROWS.items():
        text = json.dumps(row)
        (folder / file).write_text(f"[{text}]" if file.endswith(".json") else f"{text}\n")
    (folder / "my_rewards.py").write_text(next(text for language, text in fences(README) if language == "python"))
    for task in TASKS:
        for stage, kind in (("sft", "policy"), ("rm", "reward"), ("rm-test", "reward")):
            publish(RunDir(folder / "runs" / task), stage, kind)
    for stage in ("ppo", "dpo"):  # what is merged
        publish(RunDir(folder / "runs" / "demo"), stage, "policy")
    return folder


def publish(run: RunDir, stage: str, kind: str) -> None:
    """A finished stage, but for its weights."""
    folder = run.stage(stage)
    with folder.open({"stage": stage}):
        (folder.export_dir("model") / "config.json").write_text("{}")
        folder.publish(kind, {"tokenizer_hash": "-", "template_hash": "-"}, 1)


@pytest.mark.parametrize(("page", "words"), RLHF)
def test_rlhf_commands_are_accepted(page, words, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    command = words[0]
    if command in STAGES or command == "run":
        words = [*words, *(["--dry-run"] if "--dry-run" not in words else [])]
    elif command not in REAL:
        parse(typer.main.get_command(app), words)
        return
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, str(done.exception) if isinstance(done.exception, UserError) else done.output


def parse(group: typer.core.TyperGroup, words: list[str]) -> None:
    """The command that the words call takes its arguments and options; nothing is run."""
    context = group.make_context("rlhf", list(words))
    command = group.commands[words[0]]
    if isinstance(command, typer.core.TyperGroup):
        parse(command, words[1:])
    else:
        command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize("words", MAKE)
def test_make_targets_and_variables_exist(words):
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9 ]+):(?!=)", text, re.MULTILINE))
    known = {target for line in targets for target in line.split()}
    settings = set(re.findall(r"^(\w+) \?=", text, re.MULTILINE))
    for word in words[1:]:
        setting, equals, _ = word.partition("=")
        assert setting in (settings if equals else known), word


def test_every_command_and_every_stage_option_is_in_the_readme():
    text = README.read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    options = {option for param in group.commands["ppo"].params for option in param.opts if option.startswith("--")}
    assert not [c for c in group.commands if not group.commands[c].hidden and f"rlhf {c} " not in text]
    assert not [option for option in sorted(options) if option not in text]


# --- what is looked up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_overrides_in_the_text_are_valid(page):
    for span in spans(page):
        words = shlex.split(span) if span.startswith("--set ") else []
        values = [value for flag, value in zip(words[::2], words[1::2], strict=True) if flag == "--set"]
        assert values in ([], ["KEY=VALUE"]) or any(accepts(stage, values) for stage in RECIPES), span


def accepts(stage: str, overrides: list[str]) -> bool:
    try:
        load_recipe(ROOT / "recipes" / "hh" / f"{stage}.yaml", stage, overrides)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_recipe_keys_in_the_text_exist(page):
    known = {key.replace(".0.", "[].") for recipe in RECIPES.values() for key, _, _ in walk(recipe)}
    known |= {f"{key}[]" for key in known} | {"data.sources[].*", "data.eval.*"}
    for span in spans(page):
        first = re.match(r"[a-z_]+(\[\])?(?=\.)", span)
        if first and first.group().removesuffix("[]") in known and re.fullmatch(r"[a-z_.\[\]]+", span):
            assert span in known or (page.parent / span).exists() or is_file_name(span), span


def is_file_name(span: str) -> bool:
    return Path(span).suffix in (".py", ".md", ".yaml", ".json", ".jsonl", ".html", ".txt", ".sh")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_metrics_in_the_text_are_in_the_table(page):
    table = set(re.findall(r"`([a-z]+/[a-z_]+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")))
    for span in spans(page):
        if re.fullmatch(r"(train|eval|policy|value|reward|rollout|label|judge|speed)/[a-z_0-9]+", span):
            assert span in table, span


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_named_files_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, section = target.partition("#")
        if path.startswith("https://"):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not section or section in anchors(linked), target
    for span in spans(page):
        if re.fullmatch(r"(tests|docs|scripts|recipes|rlhf)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"(algo|data|models|rewards|train|engine|recipe|run)/\w+\.py", span):
            assert (ROOT / "rlhf" / span).exists(), span


def anchors(page: Path) -> set[str]:
    """The sections that can be linked to."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {"".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_") for title in titles}


def test_the_file_tree_of_the_readme_exists():
    tree = next(text for _, text in fences(README) if text.startswith("rlhf/\n"))
    mentioned = set()
    for line in tree.splitlines():
        place = ROOT / "rlhf" if line.startswith("  ") else ROOT
        first = line.split()[0]
        assert (place / first).exists(), first
        mentioned.add(first.rstrip("/"))
        for file in re.findall(r"\b[\w-]+\.(?:py|md|sh|example)\b", line):
            folders = (place, place / first)
            assert any((folder / file).exists() for folder in folders), f"{first}: {file}"
    parts = {path.name for path in (ROOT / "rlhf").iterdir() if not path.name.startswith(("_", "."))}
    assert parts - {"py.typed"} <= mentioned


def test_the_readme_shows_a_first_result_at_once():
    assert "make demo" in README.read_text(encoding="utf-8").splitlines()[:30]


def test_the_exit_codes_of_the_readme_are_those_of_the_errors():
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)}
    found = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, UserError)]
    assert told == {0, *(error.exit_code for error in found)}


def test_the_torch_of_the_readme_is_the_tested_one():
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and f"pip install torch=={pinned[1]} --index-url" in README.read_text(encoding="utf-8")


def test_the_reward_function_of_the_readme_scores(workplace):
    scores = user_function([{}, {}], ["A pear.", "no"], function=f"{workplace / 'my_rewards.py'}:score", timeout=60.0)
    assert scores == [1.0, 0.0]


def test_python_in_the_pages_compiles():
    for page in PAGES:
        for language, text in fences(page):
            if language == "python":
                compile(text, name(page), "exec")
