"""The last questions before a model is loaded: what only configurations, tokenizers and token rows can answer."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from rlhf.data import chat
from rlhf.data.examples import Loaded, PromptExample
from rlhf.errors import CheckpointError, DataError, RecipeError
from rlhf.models.build import has_score_head, max_positions
from rlhf.models.load import read_config
from rlhf.models.tokenizer import ensure_pad, load_tokenizer
from rlhf.recipe.reward_options import ExactReward, FunctionReward, NumericReward
from rlhf.recipe.schema import ModelRef
from rlhf.recipe.stages import PreferenceRecipe, RewardRecipe, ScoringRecipe, SFTRecipe
from rlhf.rewards.rules import RULES, load_function
from rlhf.train.job import Job, model_refs
from rlhf.train.objectives import bind
from rlhf.train.samples import shown_prompts


def check_models(job: Job, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every model of the stage is of the right kind, has room for the rows, and reads the same tokens as the policy."""
    if not isinstance(job.recipe, RewardRecipe):
        chat.stop_token_ids(tokenizer, None, extra=job.recipe.sampling.stop)  # for what it refuses
    for key, ref, kinds in model_refs(job.stage, job.recipe):
        if not (ref.from_ or ref.path):
            continue
        source = job.source(key, ref)
        config = read_config(source, ref.revision)
        is_scorer = has_score_head(source, ref.revision)
        if ref.path:
            check_kind(kinds, is_scorer, config, f"{key}.path", source)
        check_context(config, job.recipe.data.max_length, source)
        if key != "model":
            check_tokens(tokenizer, ref, config, key, source, reads_text=is_scorer)


def check_kind(kinds: tuple[str, ...], is_scorer: bool, config: PreTrainedConfig, key: str, source: str) -> None:
    """A model with a score head is no policy, and one without is no reward model."""
    if is_scorer and kinds == ("policy",):
        wanted, found = "policy", "model with a score head"
    elif not is_scorer and kinds == ("reward",):
        wanted, found = "reward model", "model without a score head"
    else:
        return
    raise CheckpointError(
        f"expected a {wanted}, found a {found} ({', '.join(config.architectures or ['?'])}) in {source}",
        where=key,
        fix=f"Name a {wanted}: a folder of your own, a hub id, or `from:` a stage that makes one.",
    )


def check_context(config: PreTrainedConfig, max_length: int, source: str) -> None:
    """No row is longer than what the model was made for."""
    room = max_positions(config)
    if room is not None and max_length > room:
        raise RecipeError(
            f"expected at most {room}, the positions of {source}, found {max_length}",
            where="data.max_length",
            fix=f"Set data.max_length to {room} or less; longer rows are then treated as data.on_long says.",
        )


def check_tokens(
    tokenizer: PreTrainedTokenizerFast,
    ref: ModelRef,
    config: PreTrainedConfig,
    key: str,
    source: str,
    *,
    reads_text: bool,
) -> None:
    """A role gets the policy's tokens as they are, so it must have the same vocabulary.

    reads_text: the role has learned from rendered conversations, so its chat template (if it has one) must agree too.
    """
    own = load_tokenizer(source, ref.revision)
    ensure_pad(own, config)
    where = f"{key}.{'from' if ref.from_ else 'path'}"
    fix = "Texts are not rendered again for other models: start all from the same SFT stage, model: {from: sft}."
    if chat.tokenizer_hash(own) != chat.tokenizer_hash(tokenizer):
        raise CheckpointError(f"expected the policy's tokenizer, found another one in {source}", where=where, fix=fix)
    if reads_text and own.chat_template and chat.template_hash(own) != chat.template_hash(tokenizer):
        what = f"expected the policy's chat template, found another one in {source}"
        raise CheckpointError(what, where=where, fix=f"{fix} Or leave out model.chat_template.")


def check_rewards(job: Job, prompts: list[PromptExample]) -> None:
    """The reward files load, and every row has the reference answer that a rule compares with."""
    recipe = job.recipe
    if not isinstance(recipe, ScoringRecipe):
        return
    for spec in recipe.rewards:
        if isinstance(spec, FunctionReward):
            load_function(spec.function)
        elif isinstance(spec, (ExactReward, NumericReward)):
            rule = bind(RULES, spec)
            for example in prompts:
                try:
                    rule([example.fields], [""])
                except DataError as error:
                    raise DataError(error.what, where=example.where, fix=error.fix) from None


def check_samples(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> None:
    """The sample generations of an offline stage fit into the model behind their prompts."""
    recipe = job.recipe
    if not isinstance(recipe, (SFTRecipe, PreferenceRecipe)):
        return
    if recipe.model.init is not None:
        room: int | None = recipe.model.init.context
    else:
        room = max_positions(read_config(job.source("model", recipe.model), recipe.model.revision))
    longest = max((len(prompt.ids) for prompt in shown_prompts(recipe.log, data, tokenizer)), default=0)
    if room is not None and longest and longest + recipe.sampling.max_new_tokens > room:
        raise RecipeError(
            f"expected at most {room - longest}: the model has {room} positions and a shown prompt takes {longest},"
            f" found {recipe.sampling.max_new_tokens}",
            where="sampling.max_new_tokens",
            fix="Lower it, or show no samples with log.samples: 0.",
        )
