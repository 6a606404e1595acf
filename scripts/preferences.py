"""Every loss of `rlhf dpo` on the demo task: trains what is missing, each with its default options, writes a table.

    python -m scripts.preferences --runs runs/preferences --jobs 2
    python -m scripts.preferences --runs runs/preferences --table-only

All losses share one sft stage, and the rows they learn from: the demo's pairs, its lists, or pairs that a label stage
has scored. Run again, it goes on: finished stages say so, interrupted ones resume. The table is made from the run
directory alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.masked import row_sums
from rlhf.algo.registry import Entry
from rlhf.data import collate
from rlhf.data.demo import demo_rows, gold_reward
from rlhf.data.examples import PairExample, load_examples
from rlhf.errors import RecipeError
from rlhf.eval.demo import judge, sampling_of
from rlhf.eval.metrics import estimate
from rlhf.eval.policy import evaluate_policy, load_policy
from rlhf.models.forward import PolicyModule
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.loss_options import LossBlock
from rlhf.recipe.options import PreferenceLoss
from rlhf.recipe.schema import DataBlock
from rlhf.run.commit import read_json, write_atomic, write_json
from rlhf.run.lineage import content_hash
from rlhf.run.rundir import RunDir
from rlhf.train.catalogue import chosen
from rlhf.train.describe_preferences import implicit
from rlhf.train.objectives import join, trained
from scripts.algorithms import RECIPES, ROOT, Task, train
from scripts.make_docs import table

PAGE = ROOT / "docs" / "preferences.md"
ENOUGH = 0.75  # accuracy below which the table owes a reason
LISTS = ("data={path: demo:lists, eval: {path: demo:eval_lists}, max_length: 96}",)
SCORED = ("data={from: label, limit: 6000, eval_rows: 500, max_length: 96}",)
_NEAR_SFT = (
    "its likelihood term keeps the policy near SFT, and the score is the log-prob itself, of which SFT's says little;"
    " the log-ratio to SFT, in the next column, has learned more"
)
_DRIFTS = "every pair keeps pushing, and the policy drifts from SFT (KL) further than it learns to rank"
# Why a loss is below that on this task with its default options, beside its figure.
REASONS = {
    "tdpo1": "its KL term holds back the chosen answer as well; tdpo2, which halves it, does better",
    "f_dpo": "the Jensen-Shannon default damps raising the chosen answer and not lowering the rejected one",
    "ipo_avg": "tau 0.1 asks for a margin of 5 nats per token, out of reach here: it goes far for little",
    "dpop": "lam 50 is meant for large models: the penalty outweighs the preference, and hardly anything moves (KL)",
    "beta_dpo": "outlying pairs, here the clearest ones, are dropped, and what is left is pushed on (KL)",
    "aot": "it compares the distributions of chosen and rejected answers, not the two answers to one prompt",
    "pair_logistic": "near ties of the noisy scores count like clear differences",
    "lipo_lambda": "ranks by the policy's own scores weigh the pairs, all equal at first, and beta 0.05 lets it drift",
    "exo_rw": "beta_r 0.1 puts all weight on the best of the noisy scores: it learns the noise",
    "d2o": "it is told the worst answer and takes the others for equal: it learns to avoid, not to rank",
    "rso_hinge": f"gamma 0.05 asks for a margin of 20 nats: {_DRIFTS}",
    "exo_pref": f"label_smoothing 0.001 asks for a margin of 69 nats: {_DRIFTS}",
    "sppo_hard": f"beta 0.001 asks for log-ratios of 500 nats: {_DRIFTS}",
    "sppo": f"beta 0.001 asks for log-ratios of hundreds of nats: {_DRIFTS}",
    "apo_zero": f"nothing but the sigmoids' flat ends stops it: {_DRIFTS}",
    "apo_zero_unpaired": f"nothing but the sigmoids' flat ends stops it: {_DRIFTS}",
    "apo_down": "it lowers the chosen answers too, which is right where the policy's own are better, not here",
    "discopop": "its gradient has the wrong sign around a margin of 0, where training starts",
    "simpo": "no reference holds it, and its score is the log-prob per token, of which SFT's says little",
    "slic_hf": "two answers differ by more than its margin of 1 nat anyway: most pairs never have a gradient",
    "unlikelihood_token": "it pushes every token of the rejected answer down, those of good reviews among them",
    "pairwise_cringe": "it pushes tokens of the rejected answer down, those of good reviews among them",
    "cringe": "it pushes tokens of bad answers down, those of good reviews among them",
    "npo": "it sees only bad answers and pushes them down; nothing says what is better",
    "dno": "its labels are soft: win probabilities of the reward model, on pairs that are much alike",
    "dpo_reward_margin": "it learns from pairs of the SFT model's own answers, fewer and more alike than the demo's",
    "dro_v": "tau 1 makes each log-ratio worth a reward of one deviation: it hardly moves (KL)",
    "bco": "answers taken apart: what makes one prompt's answers better than another's is noise to it",
    "kto": "answers taken apart: what makes one prompt's answers better than another's is noise to it",
    "aot_unpaired": "it compares the distributions of good and bad answers, not the two answers to one prompt",
    **dict.fromkeys(("orpo", "cpo", "preferred_ft", "unlikelihood_seq", "rrhf", "pro"), _NEAR_SFT),
}


def blocks() -> dict[str, tuple[type[LossBlock], Entry]]:
    """The option block and the entry of every loss."""
    return {entry.name: (block, entry) for block, entry in chosen(PREFERENCE_LOSSES, PreferenceLoss)}  # type: ignore[misc]


def tasks_of(run: Path, names: Sequence[str]) -> list[Task]:
    """SFT, a reward model and labelled pairs for those that need scores, and a stage per loss."""
    known = blocks()
    scored = any(known[name][0].needs and known[name][0].rows == "pairs" for name in names)
    shared = [Task(run, "sft", "sft", ())]
    if scored:
        shared += [Task(run, "rm", "rm", ("sft",)), Task(run, "label", "label", ("sft", "rm"), settings=LABEL)]
    return shared + [task_of(run, name, *known[name]) for name in names]


LABEL = ("model.from=sft", "data.limit=2000", "label.pairs=all")


def task_of(run: Path, name: str, block: type[LossBlock], entry: Entry) -> Task:
    """The stage that trains one loss with its default options."""
    settings, after = (f"loss={{name: {name}}}", "eval.every=0", "log.samples=0"), ("sft",)
    if block.rows == "lists":
        settings += LISTS
    elif block.needs and block.rows == "pairs":
        settings, after = settings + SCORED, ("label",)
    return Task(run, name, "dpo", after, recipe="dpo", settings=settings)


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the table says of one loss."""

    accuracy: float  # of the implicit reward, against the gold order of held-out pairs
    accuracy_se: float
    ratio_accuracy: float  # the same of the log-ratio to SFT, whatever the loss's implicit reward is
    gold: float  # of one answer to each held-out prompt
    gold_se: float
    kl: float  # to SFT, nats per answer
    length: float  # words
    both_fell: float  # share of held-out pairs whose sides are both less likely than under SFT
    seconds: float


def gold_pairs(model: Path) -> list[PairExample]:
    """The held-out pairs with the better side by the gold reward as chosen; equal ones are left out."""
    tokenizer = load_tokenizer(str(model), None)
    rows = demo_rows("eval_pairs")
    examples = load_examples(DataBlock(path="demo:eval_pairs"), tokenizer, "pairs", seed=0).train
    found: list[PairExample] = []
    for example in examples:
        row = rows[example.row]
        chosen_gold, rejected_gold = (gold_reward(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        if chosen_gold != rejected_gold:
            found.append(example if chosen_gold > rejected_gold else turned(example))
    return found


def turned(pair: PairExample) -> PairExample:
    """The same pair, the other way round."""
    return PairExample(
        pair.prompt_ids,
        pair.rejected_ids,
        pair.rejected_mask,
        pair.chosen_ids,
        pair.chosen_mask,
        pair.margin,
        pair.row,
    )


@torch.no_grad()
def pair_sums(policy: PolicyModule, pairs: Sequence[PairExample], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs and lengths of both sides, (n, 2) each."""
    sums, lengths = [], []
    for at in range(0, len(pairs), 128):
        both = join(collate.pairs(pairs[at : at + 128], pad_id))
        mask = trained(both.mask)
        sums.append(torch.stack(row_sums(policy(both.ids, both.attention, mask), mask).chunk(2), -1))
        lengths.append(torch.stack(mask.sum(-1).chunk(2), -1))
    return torch.cat(sums), torch.cat(lengths)


def verdict(run: Path, name: str) -> Verdict:
    """Judge one finished stage."""
    torch.set_num_threads(1)
    directory = RunDir(run)
    base, stage = directory.stage("sft"), directory.stage(name)
    reference, policy = load_policy(base), load_policy(stage)
    pairs, pad_id = gold_pairs(base.model), base.read_manifest()["facts"]["pad_id"]
    ref, lengths = pair_sums(reference, pairs, pad_id)
    found, _ = pair_sums(policy, pairs, pad_id)
    traits = PREFERENCE_LOSSES[name].traits if name != "sft" else PREFERENCE_LOSSES["preferred_ft"].traits
    rewards = implicit(found, ref, lengths, traits, 1.0)
    right = estimate((rewards[:, 0] > rewards[:, 1]).double().tolist())
    prompts = [row["prompt"] for row in demo_rows("eval_prompts")]
    answers = evaluate_policy(stage, reference, "demo:eval_prompts", sampling_of(base))
    scores = judge(prompts, answers.texts)
    status = stage.read_status()
    return Verdict(
        right.mean,
        right.se,
        estimate(((found - ref)[:, 0] > (found - ref)[:, 1]).double().tolist()).mean,
        scores.gold.mean,
        scores.gold.se,
        estimate(answers.kl).mean,
        scores.length,
        (found < ref).all(-1).double().mean().item(),
        status["ended"] - status["started"],
    )


def judged(run: Path, names: Sequence[str], jobs: int) -> dict[str, Verdict]:
    """The verdicts of all finished stages, kept beside the run's report while the stage is what it was."""
    directory, kept = RunDir(run), run / "report" / "preferences.json"
    finished = {stage.name for stage in directory.describe() if stage.state == "finished"}
    there = [name for name in ("sft", *names) if name in finished]
    hashes = {name: content_hash(directory.stage(name).read_manifest()) for name in there}
    records: dict[str, Any] = read_json(kept) if kept.exists() else {}
    records = {name: record for name, record in records.items() if name in hashes and record["key"] == hashes[name]}
    missing = [name for name in there if name not in records]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(verdict, [run] * len(missing), missing)
        records |= {name: {"key": hashes[name], **asdict(each)} for name, each in zip(missing, found, strict=True)}
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, records)
    return {name: Verdict(**{key: value for key, value in records[name].items() if key != "key"}) for name in there}


# --- the page --------------------------------------------------------------------------------------------------------

HEADER = (
    "loss",
    "learns from",
    "accuracy",
    "of log-ratio",
    "gold reward",
    "KL to SFT",
    "words",
    "both fell",
    "seconds",
)
TEXT = """\
<!-- Made by `python -m scripts.preferences`: run that again, with --table-only where nothing is to be trained. -->
# Preference losses on the demo task

Every loss of `rlhf dpo` with its **default options** on the [demo task](../recipes/demo/README.md), from the same SFT \
model, with the learning rate and batch of [dpo.yaml](../recipes/demo/dpo.yaml). One seed: differences of less than \
two or three standard errors say nothing, and a loss whose defaults were chosen for large models may want another \
beta or learning rate here.

{table}

- **learns from**: `pairs`: the demo's noisy pairs (6,000); `answers`: the same pairs taken apart; `lists`: 4 scored \
answers to each prompt; `scored pairs`: pairs of the SFT model's own answers, scored by the reward model (`rlhf label`).
- **accuracy** ± standard error: how often the implicit reward has the held-out pairs in the order of the gold reward. \
Losses without a reference are judged by their log-probs, as they are trained: the SFT model's own log-probs have \
{sft:.3f}. **of log-ratio**: the same of the log-ratio to SFT, which every policy has.
- **gold reward** ± standard error: of one answer to each of {prompts} held-out prompts, which no stage has seen.
- **KL to SFT**: nats per answer. **words**: mean length of an answer.
- **both fell**: share of the held-out pairs of which both answers are less likely than under SFT: likelihood \
displacement.
- **seconds**: of the stage, on one thread beside another one.

{reasons}
"""


def page(found: dict[str, Verdict]) -> str:
    """docs/preferences.md."""
    known = blocks()
    lines = [("SFT", "", *cells(found["sft"]))]
    lines += [(f"`{name}`", source(*known[name]), *cells(each)) for name, each in found.items() if name != "sft"]
    low = [name for name, each in found.items() if name != "sft" and each.accuracy < ENOUGH]
    reasons = "\n".join(f"- `{name}` ({found[name].accuracy:.3f}): {REASONS[name]}." for name in low if name in REASONS)
    text = f"## Below {ENOUGH}\n\n{reasons}" if reasons else ""
    prompts = len(demo_rows("eval_prompts"))
    sft = found["sft"].accuracy
    return TEXT.format(table=table(HEADER, lines), prompts=prompts, sft=sft, reasons=text).rstrip() + "\n"


def cells(each: Verdict) -> tuple[str, ...]:
    """The numbers of a line."""
    return (
        f"{each.accuracy:.3f} ± {each.accuracy_se:.3f}",
        f"{each.ratio_accuracy:.3f}" if each.ratio_accuracy else "",
        f"{each.gold:.2f} ± {each.gold_se:.2f}",
        f"{each.kl:.1f}",
        f"{each.length:.1f}",
        f"{each.both_fell:.2f}",
        f"{each.seconds:.0f}",
    )


def source(block: type[LossBlock], entry: Entry) -> str:
    """What a loss learned from in the table."""
    return "scored pairs" if block.needs and block.rows == "pairs" else block.rows


def wanted(text: str) -> list[str]:
    """The names in a list like `dpo,ipo`."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in PREFERENCE_LOSSES.names()]:
        what = f"expected names of {', '.join(PREFERENCE_LOSSES.names())}, found {', '.join(unknown)}"
        raise RecipeError(what, where="--only")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, write. Returns the exit code: 1 where a stage did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/preferences"), help="folder of the run directory")
    parser.add_argument("--seed", type=int, default=0, help="of every stage")
    parser.add_argument("--only", default=",".join(PREFERENCE_LOSSES.names()), help="losses, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time, a thread each")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder with sft.yaml, rm.yaml, dpo.yaml, ...")
    parser.add_argument("--out", type=Path, default=PAGE, help="where the table is written")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    run, names = options.runs / f"seed-{options.seed}", wanted(options.only)
    unfinished = [] if options.table_only else train(tasks_of(run, names), options.jobs, options.recipes)
    os.environ["OMP_NUM_THREADS"] = "1"
    text = page(judged(run, PREFERENCE_LOSSES.names(), options.jobs))
    write_atomic(options.out, text)
    print(text)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
