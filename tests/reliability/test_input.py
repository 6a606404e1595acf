"""Malformed recipes and data files: the rows R10 and R11 in small, and whatever hypothesis makes of both."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.records import check_records
from rlhf.data.sources import check_sources
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.load import load_recipe
from rlhf.recipe.schema import DataBlock
from scripts.reliability.sheet import ROWS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "demo").glob("*.yaml"))
SCRAPS = [
    *"\t[]{}#'\"\0\ufeff\u2028~\n",
    ": ",
    "- ",
    "? ",
    "| ",
    "  ",
    "&a ",
    "*a",
    "<<: *a\n",
    "!!python/object:x ",
    ".nan",
]
SCRAPS += ["9" * 30, "0x", "%YAML 1.1\n", "---\n", "train.lr: 1\n"]
often = settings(
    max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("id", ["R10", "R11"])
def test_nothing_malformed_gets_through_or_crashes(lab, id):
    row = ROWS[id]
    tally, _ = row.run(lab, tries=row.quick, seed=0)
    assert tally.tried >= row.quick and not tally.violations, "\n".join(tally.violations)


@st.composite
def mutated(draw: Any) -> tuple[str, str]:
    """A stage and the text of its recipe with pieces taken out, doubled, moved or put in."""
    path = draw(st.sampled_from([path for path in RECIPES if path.stem in ("sft", "rm", "ppo", "grpo", "dpo")]))
    text = path.read_text()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.sampled_from(SCRAPS), st.just(text[start:end] * 2), st.text(max_size=4)))
        text = text[:start] + piece + text[end:]
    return path.stem, text


@often
@given(mutated())
def test_a_mutated_recipe_is_loaded_or_refused(tmp_path, case):
    stage, text = case
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert load_recipe(path, stage).stage == stage
    except RecipeError as error:
        assert str(path) in str(error) and "expected" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
NAMES = ["prompt", "completion", "chosen", "rejected", "messages", "conversations", "text", "label", "score", "answers",
         "scores", "ranks", "margin", "history", "instruction", "input", "output", "system", "density"]  # fmt: skip
json_rows = st.lists(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=6), min_size=1, max_size=3)
contents = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    json_rows.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    json_rows.map(lambda rows: json.dumps(rows).encode()),
)


@often
@given(
    contents,
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.arrow"]),
    st.sampled_from(["tokens", "pairs", "answers", "lists", "prompts"]),
)
def test_any_bytes_are_rows_or_refused(content, name, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        data = DataBlock(path=str(path))
        try:
            check_sources(data, kind)
            check_records(data, kind)
        except DataError as error:
            assert str(path) in str(error) and "\n\n" not in str(error)
