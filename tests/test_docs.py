"""The pages under docs/ say what the code does: generated pages are current, tables and examples match the source."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from rlhf.algo.registry import Traits
from rlhf.batch import AnswerLogprobs, ListLogprobs, PairLogprobs
from rlhf.data.formats import detect
from rlhf.data.sources import DEMO_NAMES
from rlhf.recipe.fields import option_at, shape_of, tags
from rlhf.recipe.guard_options import metric_of_alarms
from rlhf.recipe.options import PreferenceLoss
from rlhf.recipe.schema import SourceBlock
from rlhf.recipe.stages import GRPORecipe
from rlhf.train.describe_preferences import describe
from rlhf.train.preference import Term
from scripts.make_docs import pages

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "rlhf" / "train"
VERDICTS = ROOT / "rlhf" / "rewards" / "verdicts.py"  # counts what judges say


@pytest.mark.parametrize("path", pages())
def test_generated_pages_are_current(path):
    assert (ROOT / path).read_text(encoding="utf-8") == pages()[path], "run: python -m scripts.make_docs"


# --- metrics.md -------------------------------------------------------------------------------------------------------


def test_the_table_of_metrics_is_complete_and_no_more():
    table = set()
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            cells = line.split("|")
            assert len(cells) == 5 and cells[2].strip(), line
            table |= set(re.findall(r"`([a-z_/0-9*]+)`", cells[1]))
    assert table == written_names()


def written_names() -> set[str]:
    """Every name that a run can write to metrics.jsonl, read off the source of rlhf/train."""
    found = {"step", "time"} | full_names()
    for group, names in objective_names().items():
        steps = set() if group == "ptx" else loop_names()  # ptx is a part of the policy's step
        found |= {f"{group}/{name}" for name in names | steps}
        if group == "train":  # the objectives that are evaluated on held-out rows too
            found |= {f"eval/{name}" for name in names}
    found |= {f"{group}/{name}" for group in ("train", "eval") for name in (*described_names(), "loss_*")}
    found |= coupling_names()
    rewards = option_at(GRPORecipe, ["rewards"], {})
    assert rewards is not None and rewards.shape.item is not None
    found |= {f"{group}/{kind}" for group in ("reward", "test") for kind in tags(rewards.shape.item)}
    return found | {f"alarm/{name}" for name in metric_of_alarms()}


def full_names() -> set[str]:
    """Names written out, group and all."""
    pattern = re.compile(r"(?:train|eval|policy|value|reward|rollout|label|speed|test|kl|coupling|judge)/[a-z_0-9]+")
    nodes = [
        node
        for path in (*TRAIN.glob("*.py"), VERDICTS)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {text for text in texts if pattern.fullmatch(text)}


def described_names() -> set[str]:
    """What is logged of pairs, answers and lists, whatever the loss."""
    ones, two = torch.ones(2), torch.ones(2, 2)
    views = [
        PairLogprobs(ones, ones, ones, ones, ones, ones),
        AnswerLogprobs(ones, ones, ones, ones.bool()),
        ListLogprobs(two, two, two, two, two.bool()),
    ]
    return {name for view in views for name in describe(view, Traits(), 1.0)}


def coupling_names() -> set[str]:
    """What the losses that look at the whole batch say of it: numbers for all rows, and what they remember."""
    found = set()
    for term in [Term.of(block()) for block in shape_of(PreferenceLoss).blocks]:
        if term.couple is not None:
            values = torch.linspace(-3, -1, 8)
            pairs = PairLogprobs(values, values.flip(0), values, values, values, values)
            answers = AnswerLogprobs(values, values.flip(0), values, values > -2)
            view = pairs if term.entry.inputs[0] == "pairs" else answers
            more = (values,) if term.needs_mismatched else ()
            inputs, state = term.couple(view, {}, *more, torch.linspace(0.1, 0.9, 8))
            found |= {f"coupling/{name}" for name, value in inputs.items() if value.dim() == 0}
            found |= {f"coupling/{term.entry.name}_{name}" for name in state}
    return found


def objective_names() -> dict[str, set[str]]:
    """Group -> names that its objectives hand over as the metrics of a `Loss`."""
    found: dict[str, set[str]] = {}
    body = [
        node
        for file in ("objectives.py", "ranking.py", "preference.py")
        for node in ast.parse((TRAIN / file).read_text(encoding="utf-8")).body
    ]
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        groups = [
            item.value.value
            for item in getattr(node, "body", [])
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and item.target.id == "group"
            and isinstance(item.value, ast.Constant)
        ]
        if groups:
            (loss,) = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "loss"]
            names = metrics_of(loss, functions)
            assert "loss" in names or node.name == "PreferenceObjective", node.name  # it adds its terms up afterwards
            found.setdefault(groups[0], set()).update(names)
    return found


def metrics_of(loss: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> set[str]:
    """The keys of the metrics in the body of an objective's `loss`, those of a function it unpacks among them."""
    names: set[str] = set()
    for node in ast.walk(loss):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and is_metrics(node.targets[0]):
            names |= keys(node.value)
            for call in [value for key, value in zip(node.value.keys, node.value.values, strict=True) if key is None]:
                (literal,) = [part for part in ast.walk(functions[call.func.id]) if isinstance(part, ast.Dict)]
                names |= keys(literal)
        elif isinstance(node, ast.Subscript) and is_metrics(node.value) and isinstance(node.slice, ast.Constant):
            names.add(node.slice.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Loss":
            names |= keys(node.args[1]) if isinstance(node.args[1], ast.Dict) else set()
    return names


def is_metrics(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "metrics"


def keys(node: ast.Dict) -> set[str]:
    return {key.value for key in node.keys if isinstance(key, ast.Constant)}


def loop_names() -> set[str]:
    """What the loop says of every group's steps: the ends of `f"{group}/..."`."""
    texts = re.findall(r"""f"\{[^{}]*\}/([a-z_]+)\"""", (TRAIN / "loop.py").read_text(encoding="utf-8"))
    assert texts
    return set(texts)


# --- data.md ----------------------------------------------------------------------------------------------------------

DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^`(\w+)`: [^\n]*\n```json\n(.*?)\n```", DATA, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("wanted", "row"), EXAMPLES, ids=[wanted for wanted, _ in EXAMPLES])
def test_example_rows_are_recognised_as_their_format(wanted, row):
    assert detect(json.loads(row), "data.md:1", SourceBlock(path="rows.jsonl"), "data") == wanted


def test_every_format_has_an_example():
    option = option_at(GRPORecipe, ["data", "format"], {})
    assert option is not None
    assert {wanted for wanted, _ in EXAMPLES} == set(option.shape.allowed) - {"auto"}


def test_generated_sources_of_the_demo_are_named():
    text = (ROOT / "recipes" / "demo" / "README.md").read_text(encoding="utf-8")
    assert all(f"`demo:{each}`" in text for each in DEMO_NAMES)
