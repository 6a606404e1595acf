"""`rlhf data`: what a recipe's data is like, before anything is learned from it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.errors import RecipeError
from rlhf.models.folder import ADAPTER_CONFIG, check_model_folder
from rlhf.recipe.schema import FilterBlock
from rlhf.run.rundir import RunDir, resolve_parent
from rlhf.train.job import data_kind


@dataclass(frozen=True)
class DataCommand:
    """What was typed."""

    recipe: Path
    stage: str | None
    run: Path | None
    overrides: list[str]
    reward: str | None
    as_json: bool


def report_data(command: DataCommand) -> None:
    """Check the recipe and its rows as for training, then measure and print."""
    from rlhf.cli.prepare import check_rows, data_stage, prepare

    stage = data_stage(command.recipe, command.stage)
    run = RunDir(command.run or Path("runs/data"))
    job, _ = prepare(stage, command.recipe, run, overrides=command.overrides, allowed_code=[])
    kind = data_kind(job.recipe)
    source = None if command.reward is None else reward_model(command.reward, command.run, kind)
    check_rows(job)
    from rlhf.data.care import Observer, take_care  # torch and transformers are imported here
    from rlhf.data.care_table import tables
    from rlhf.data.examples import load_examples
    from rlhf.train.tokenizers import find_tokenizer

    tokenizer = find_tokenizer(job, kind)
    # A report counts what training would refuse.
    data = job.recipe.data.model_copy(update={"on_empty": "drop", "reweight": None})
    data = data.model_copy(update={"on_long": "drop"}) if data.on_long == "error" else data
    plain = data.model_copy(update={"filter": FilterBlock()})
    scores = None
    if source is not None:
        from rlhf.train.care import pair_scores

        scores = pair_scores(job, plain, source)
    cares = []
    for each in [plain] if data.filter == FilterBlock() else [plain, data]:
        seen = Observer(kind)
        loaded = load_examples(each, tokenizer, kind, job.seed, job.new_tokens(), see=(seen.see,))
        cares.append(take_care(loaded, seen, scores))
    if command.as_json:
        named: dict[str, Any] = {"stage": stage, "all": asdict(cares[0])}
        print(json.dumps({**named, "filtered": asdict(cares[1]) if len(cares) > 1 else None}, allow_nan=False))
        return
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 160)  # piped into a file nothing is gained by breaking lines at 80
    for table in tables(f"{command.recipe}: {kind}", cares):
        out.print(table)
        out.print()


def reward_model(named: str, run: Path | None, kind: str) -> str:
    """The model folder that --reward names: a folder with a model, or a finished stage of `rlhf rm`."""
    if kind != "pairs":
        fix = "Leave the option out, or name a recipe of rlhf rm or rlhf dpo."
        raise RecipeError(f"expected a recipe that learns from pairs, found one of {kind}", where="--reward", fix=fix)
    folder = Path(os.path.expanduser(named))
    if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        check_model_folder(str(folder))
        return str(folder)
    if run is None and folder.name == named:
        fix = "Say where the stage is: --run DIR, or name the folder of a reward model."
        raise RecipeError(f"expected a run directory for the stage {named}, found none", where="--reward", fix=fix)
    return str(resolve_parent(named, RunDir(run or Path("runs/data")), ("reward",), "--reward", "rlhf data").model)
