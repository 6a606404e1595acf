"""Rules across fields, one small function each. They run on a valid recipe and yield every problem they see.

A rule yields `Problem(key, expected ..., found ...; what to do; further keys it is about)`; `load.py` adds the place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.recipe.data_rules import (
    eval_data,
    filters,
    inline_options,
    parts,
    prompt_length,
    room_for_prompts,
    source_paths,
    sources,
    templates,
)
from rlhf.recipe.judge_rules import JUDGE_RULES
from rlhf.recipe.label_rules import devices_share_answers, only_asked, rejection_sampling
from rlhf.recipe.merge_rules import different_models, merged_models, one_process, some_weight, two_models
from rlhf.recipe.metric_names import best_of_a_metric
from rlhf.recipe.policy_rules import POLICY_RULES
from rlhf.recipe.preference_rules import PREFERENCE_RULES
from rlhf.recipe.problems import Problem, closest
from rlhf.recipe.reward_options import FunctionReward, ModelReward, ProcessReward
from rlhf.recipe.reward_rules import named_rewards, reward_options
from rlhf.recipe.schema import ModelRef, ZeroBlock
from rlhf.recipe.shared_rules import share_base
from rlhf.recipe.stages import (
    AnyRecipe,
    LabelRecipe,
    LearningRecipe,
    MergeRecipe,
    OnlineRecipe,
    PPORecipe,
    PreferenceRecipe,
    Recipe,
    RewardRecipe,
    ScoringRecipe,
    SFTRecipe,
)

Problems = Iterator[Problem]
OfflineRecipe = SFTRecipe | RewardRecipe | PreferenceRecipe


def check_recipe(stage: str, recipe: AnyRecipe, world_size: int | None = None) -> list[Problem]:
    """Every broken rule of a stage. Without `world_size` (devices not known yet) rules about devices are left out."""
    problems = [problem for rule in RULES[stage] for problem in rule(recipe)]
    if isinstance(recipe, LearningRecipe):
        problems += best_of_a_metric(stage, recipe)
    if world_size is not None:
        problems += [problem for rule in DEVICE_RULES[stage] for problem in rule(recipe, world_size)]
    return problems


# --- models --------------------------------------------------------------------------------------------------------


def init_shape(recipe: Recipe) -> Problems:
    """A model from scratch: heads divide the hidden size, key/value heads divide heads, rotary needs even heads."""
    init = recipe.model.init
    if init is None:
        return
    heads, hidden = ("model.init.heads", "model.init.hidden")
    if init.hidden % init.heads:
        what = f"expected a divisor of hidden = {init.hidden}, found {init.heads}"
        yield Problem(heads, what, f"one of {_divisors(init.hidden)}", (hidden,))
    elif init.hidden // init.heads % 2:
        what = f"expected an even size per head, found {init.hidden} / {init.heads} = {init.hidden // init.heads}"
        yield Problem(heads, what, "rotary positions turn pairs of numbers: change hidden or heads", (hidden,))
    if init.kv_heads is not None and init.heads % init.kv_heads:
        what = f"expected a divisor of heads = {init.heads}, found {init.kv_heads}"
        yield Problem("model.init.kv_heads", what, f"one of {_divisors(init.heads)}", (heads,))


def init_context(recipe: Recipe) -> Problems:
    """Rows fit into a model that is made from scratch."""
    init = recipe.model.init
    if init is not None and recipe.data.max_length > init.context:
        what = f"expected at most model.init.context = {init.context}, found {recipe.data.max_length}"
        yield Problem("data.max_length", what, "lower it, or raise model.init.context", ("model.init.context",))


def init_reference(recipe: PreferenceRecipe) -> Problems:
    """Preference learning starts from a trained policy: a random one would be its own reference."""
    reference = recipe.reference
    compares = any(block.reference for block in recipe.losses)
    if compares and recipe.model.init is not None and not (reference.from_ or reference.path):
        what = "expected a trained model, found one from scratch: the reference would be random"
        yield Problem("model.init", what, "write model: {from: sft}, or name a reference")


def one_source(key: str, ref: ModelRef, *, is_optional: bool = False) -> Problems:
    """`from` or `path`, not both, and not neither where a model is needed."""
    if ref.from_ and ref.path:
        what, also = "expected one of from and path, found both", (f"{key}.from", f"{key}.path")
        yield Problem(key, what, "remove one of them", also)
    if not (ref.from_ or ref.path or is_optional):
        fix = "write from: STAGE, path: FOLDER or path: HUB_ID"
        yield Problem(key, "expected one of from and path, found neither", fix)


def revision(key: str, ref: ModelRef) -> Problems:
    """A revision belongs to a hub id."""
    if ref.revision and not ref.path:
        also = (f"{key}.path",)
        yield Problem(
            f"{key}.revision", "expected path beside it, found none", "only hub ids have revisions: remove it", also
        )


def sources_of_roles(recipe: Recipe) -> Problems:
    """Every role's model is named once."""
    for key, ref, is_optional in _roles(recipe):
        if key != "model":
            yield from one_source(key, ref, is_optional=is_optional)
        yield from revision(key, ref)


def sources_of_merged(recipe: MergeRecipe) -> Problems:
    """The base and every model are named once."""
    for key, ref in merged_models(recipe):
        yield from one_source(key, ref)
        yield from revision(key, ref)


def _roles(recipe: Recipe) -> Iterator[tuple[str, ModelRef, bool]]:
    """(key, block, may it be left without a source) of every model in a recipe."""
    yield "model", recipe.model, False
    if isinstance(recipe, (PreferenceRecipe, OnlineRecipe)):
        yield "reference", recipe.reference, True
    if isinstance(recipe, PPORecipe):
        yield "critic", recipe.critic, False
    if isinstance(recipe, PreferenceRecipe):
        yield "critic", recipe.critic, True
    for key, reward in named_rewards(recipe):
        if isinstance(reward, ModelReward):
            yield key, reward, False


def chat_template(recipe: Recipe) -> Problems:
    """A template is one of ours or a file."""
    name = recipe.model.chat_template
    if name is not None and name not in ("chatml", "plain") and not name.endswith(".jinja"):
        near = closest(name, ("chatml", "plain"))
        fix = f"did you mean {near[0]}?" if near else "files must end in .jinja"
        yield Problem("model.chat_template", f"expected chatml, plain or a .jinja file, found {name!r}", fix)


def flash_needs_bf16(recipe: Recipe) -> Problems:
    """Flash attention has no fp32 kernel."""
    if recipe.model.attention == "flash_attention_2" and recipe.model.dtype != "bf16":
        what = "expected sdpa, eager or flex_attention with dtype fp32, found flash_attention_2"
        yield Problem("model.attention", what, "set model.dtype to bf16, or attention to sdpa", ("model.dtype",))


def lora_target(recipe: Recipe) -> Problems:
    """Adapters need somewhere to go."""
    if recipe.model.lora is not None and not recipe.model.lora.target:
        yield Problem("model.lora.target", "expected module names or all-linear, found nothing", "remove the key")


def l1_of_a_change(recipe: SFTRecipe) -> Problems:
    """What is held to its start has one, and is the weight itself: a product of two adapters is not sparse."""
    if recipe.train.l1 and recipe.model.init is not None:
        what, fix = "expected 0 for a model from scratch, found", "a random start is nothing to stay near: remove it"
        yield Problem("train.l1", f"{what} {recipe.train.l1:g}", fix, ("model.init",))
    if recipe.train.l1 and recipe.model.lora is not None:
        what, fix = "expected 0 with adapters, found", "train in full, or thin the change out when merging (ties, dare)"
        yield Problem("train.l1", f"{what} {recipe.train.l1:g}", fix, ("model.lora",))


def no_dropout(recipe: Recipe) -> Problems:
    """Dropout makes the same tokens' log-probabilities differ between two passes: only SFT can live with that."""
    why = "only sft trains with dropout: elsewhere two passes over the same tokens must agree"
    if recipe.model.dropout:
        yield Problem("model.dropout", "expected false, found true", why)
    if recipe.model.lora is not None and recipe.model.lora.dropout:
        yield Problem("model.lora.dropout", f"expected 0, found {recipe.model.lora.dropout:g}", why)


# --- sharding ------------------------------------------------------------------------------------------------------


def zero_of_roles(recipe: Recipe) -> Problems:
    """What DeepSpeed can do for trained and for frozen models."""
    if isinstance(recipe, LabelRecipe):
        yield from frozen_zero("zero", recipe.zero)
    else:
        yield from trained_zero("zero", recipe.zero, recipe.model.dtype)
    if isinstance(recipe, PPORecipe) or (isinstance(recipe, PreferenceRecipe) and recipe.learns_value):
        yield from trained_zero("critic.zero", recipe.critic.zero, recipe.model.dtype)
    if isinstance(recipe, (PreferenceRecipe, OnlineRecipe)):
        yield from frozen_zero("reference.zero", recipe.reference.zero)
    for key, reward in named_rewards(recipe):
        if isinstance(reward, ModelReward):
            yield from frozen_zero(f"{key}.zero", reward.zero)


def trained_zero(key: str, zero: ZeroBlock, dtype: str) -> Problems:
    """bf16 keeps its fp32 master weights in the sharded optimizer; offloading needs one too."""
    stage = f"{key}.stage"
    if dtype == "bf16" and zero.stage == 0:
        why = "the fp32 master weights of bf16 training live in ZeRO's optimizer: set the stage to 1, or dtype to fp32"
        yield Problem(stage, "expected 1, 2 or 3 with model.dtype bf16, found 0", why, ("model.dtype",))
    if zero.offload_optimizer and zero.stage == 0:
        yield Problem(f"{key}.offload_optimizer", "expected false at stage 0, found true", f"raise {stage}", (stage,))
    yield from _offload_params(key, zero)


def frozen_zero(key: str, zero: ZeroBlock) -> Problems:
    """A frozen model has no optimizer to shard: stage 0 or 3."""
    if zero.stage in (1, 2):
        fix = "stages 1 and 2 shard an optimizer, which a frozen model has not"
        yield Problem(f"{key}.stage", f"expected 0 or 3 for a frozen model, found {zero.stage}", fix)
    if zero.offload_optimizer:
        what = "expected false for a frozen model, found true"
        yield Problem(f"{key}.offload_optimizer", what, "remove it: there is no optimizer state")
    yield from _offload_params(key, zero)


def _offload_params(key: str, zero: ZeroBlock) -> Problems:
    if zero.offload_params and zero.stage != 3:
        what = f"expected false at stage {zero.stage}, found true"
        fix = "only stage 3 can keep parameters elsewhere: set the stage to 3"
        yield Problem(f"{key}.offload_params", what, fix, (f"{key}.stage",))


# --- sampling -----------------------------------------------------------------------------------------------------


def stop_texts(recipe: SFTRecipe | PreferenceRecipe | ScoringRecipe) -> Problems:
    """An empty stop text would end every answer at once."""
    for i, text in enumerate(recipe.sampling.stop):
        if not text:
            yield Problem(f"sampling.stop.{i}", "expected a token, found empty text", "remove it")


# --- batches -------------------------------------------------------------------------------------------------------


def minibatches(recipe: OnlineRecipe) -> Problems:
    """Optimizer steps of one pass have the same number of rows."""
    train = recipe.train
    rows = train.prompts * train.answers
    if rows % train.minibatches:
        what = f"expected a divisor of prompts x answers = {train.prompts} x {train.answers} = {rows}"
        also = ("train.prompts", "train.answers")
        fix = f"one of {_divisors(rows)}"
        yield Problem("train.minibatches", f"{what}, found {train.minibatches}", fix, also)


def devices_share_batches(recipe: OfflineRecipe, world_size: int) -> Problems:
    """Every device gets the same number of rows of every optimizer step."""
    yield from _multiple("train.batch_size", recipe.train.batch_size, world_size)


def devices_share_rollouts(recipe: OnlineRecipe, world_size: int) -> Problems:
    """Every device samples the same number of prompts and learns from the same number of rows."""
    train = recipe.train
    yield from _multiple("train.prompts", train.prompts, world_size)
    rows = train.prompts * train.answers
    if train.prompts % world_size == 0 and rows % train.minibatches == 0 and rows // train.minibatches % world_size:
        size = rows // train.minibatches
        what = f"expected minibatches of a multiple of {world_size} rows, one share per device, found {size} rows"
        also = ("train.prompts", "train.answers")
        fix = f"{rows} rows in {train.minibatches} minibatches: change prompts, answers or minibatches"
        yield Problem("train.minibatches", what, fix, also)


def _multiple(key: str, count: int, world_size: int) -> Problems:
    if count % world_size:
        near = max(count // world_size, 1) * world_size
        what = f"expected a multiple of the {world_size} devices, found {count}"
        yield Problem(key, what, f"for example {near}")


def _divisors(number: int) -> str:
    """The divisors of a number, at most a dozen of them, as a list in words."""
    every = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(map(str, every[:12])) + (", ..." if len(every) > 12 else "")


Rule = Callable[[Any], Problems]
COMMON: tuple[Rule, ...] = (
    init_shape,
    init_context,
    sources_of_roles,
    chat_template,
    flash_needs_bf16,
    lora_target,
    zero_of_roles,
    inline_options,
    source_paths,
    parts,
    templates,
    prompt_length,
    filters,
)
ONLINE: tuple[Rule, ...] = (
    *COMMON,
    no_dropout,
    room_for_prompts,
    stop_texts,
    reward_options,
    minibatches,
    share_base,
    *POLICY_RULES,
)

RULES: dict[str, tuple[Rule, ...]] = {
    "sft": (*COMMON, l1_of_a_change, eval_data, stop_texts),
    "rm": (*COMMON, no_dropout, eval_data),
    "ppo": ONLINE,
    "grpo": ONLINE,
    "dpo": (*COMMON, no_dropout, init_reference, eval_data, stop_texts, *PREFERENCE_RULES),
    "label": (*COMMON, only_asked, rejection_sampling, room_for_prompts, stop_texts, reward_options, *JUDGE_RULES),
    "merge": (sources_of_merged, different_models, some_weight, two_models),
}
DEVICE_RULES: dict[str, tuple[Callable[[Any, int], Problems], ...]] = {
    "sft": (devices_share_batches,),
    "rm": (devices_share_batches,),
    "ppo": (devices_share_rollouts,),
    "grpo": (devices_share_rollouts,),
    "dpo": (devices_share_batches,),
    "label": (devices_share_answers,),
    "merge": (one_process,),
}

# --- files ---------------------------------------------------------------------------------------------------------

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt", ".gz")


def looks_local(path: str) -> bool:
    """Whether a data path means this machine rather than the hub: by its form, its ending, or because it exists."""
    return path.startswith((".", "/", "~")) or path.endswith(DATA_SUFFIXES) or os.path.exists(path)


def missing_files(recipe: AnyRecipe) -> list[Problem]:
    """Templates and reward functions named by the recipe that are not there, relative to the current directory."""
    named = []
    template = recipe.model.chat_template if isinstance(recipe, Recipe) else None
    if template and template.endswith(".jinja"):
        named.append(("model.chat_template", template))
    for key, reward in named_rewards(recipe):
        if isinstance(reward, (FunctionReward, ProcessReward)):
            named.append((f"{key}.function", reward.function.rpartition(":")[0]))
    return [_missing(key, file) for key, file in named if not os.path.isfile(file)]


def missing_data(recipe: AnyRecipe) -> list[Problem]:
    """Local data files and folders that are not there, relative to the current directory."""
    named = [(f"{key}.path", source.path) for key, source in sources(recipe) if source.path]
    return [
        _missing(k, path) for k, path in named if looks_local(path) and not os.path.exists(os.path.expanduser(path))
    ]


def _missing(key: str, file: str) -> Problem:
    folder = Path(os.path.expanduser(file)).parent
    is_open = os.path.isdir(folder) and os.access(folder, os.R_OK)
    near = closest(Path(file).name, os.listdir(folder)) if is_open else []
    fix = f"did you mean {folder / near[0]}?" if near else f"it is looked for from {Path.cwd()}"
    return Problem(key, f"expected a file, found nothing at {file}", fix)
