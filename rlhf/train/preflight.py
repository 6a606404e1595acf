"""The last questions before a model is loaded: what only configurations, tokenizers and token rows can answer."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from rlhf.data import chat
from rlhf.data.examples import Loaded, PromptExample
from rlhf.engine import dist
from rlhf.errors import CheckpointError, DataError, RecipeError
from rlhf.models.build import has_score_head, max_positions
from rlhf.models.load import read_config
from rlhf.models.statistics import read_statistics
from rlhf.models.tokenizer import ensure_pad, load_tokenizer
from rlhf.recipe.judge_options import EndpointBlock
from rlhf.recipe.reward_options import (
    ExactReward,
    FunctionReward,
    HttpReward,
    ModelReward,
    NumericReward,
    ProcessReward,
)
from rlhf.recipe.reward_rules import named_rewards
from rlhf.recipe.schema import ModelRef
from rlhf.recipe.stages import GRPORecipe, LabelRecipe, PreferenceRecipe, RewardRecipe, SFTRecipe
from rlhf.rewards.chat_service import check_service
from rlhf.rewards.http import check_reachable, read_key
from rlhf.rewards.rules import RULES
from rlhf.rewards.user_code import load_function
from rlhf.train.job import Job, model_refs, same_tokens_fix
from rlhf.train.objectives import bind
from rlhf.train.samples import shown_prompts
from rlhf.train.scorers import own_template, own_tokenizer, reads_alike


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
        if isinstance(ref, ModelReward) and not check_reward_model(job, tokenizer, ref, key, source):
            continue  # its rows are its own: those over its positions are unscored
        check_context(config, job.recipe.data.max_length, source)
        if key != "model":
            fix = same_tokens_fix(key, job.recipe.model)
            check_tokens(tokenizer, ref, config, key, source, reads_text=is_scorer, fix=fix)
    check_opponent(job)


def check_opponent(job: Job) -> None:
    """The distributions that an opponent mixes are over the same tokens, padding of the vocabulary included."""
    recipe = job.recipe
    if not isinstance(recipe, GRPORecipe) or recipe.opponent is None or recipe.model.init is not None:
        return
    if not (recipe.reference.from_ or recipe.reference.path):
        return
    refs: dict[str, ModelRef] = {"model": recipe.model, "reference": recipe.reference}
    sizes = {
        key: read_config(job.source(key, ref), ref.revision).get_text_config().vocab_size for key, ref in refs.items()
    }
    if sizes["model"] != sizes["reference"]:
        raise CheckpointError(
            f"expected the policy's {sizes['model']} tokens, found a model of {sizes['reference']}",
            where="reference",
            fix="The opponent mixes both token by token: start both from the same SFT stage.",
        )


def check_reward_model(job: Job, tokenizer: PreTrainedTokenizerFast, ref: ModelReward, key: str, source: str) -> bool:
    """A reward model has the statistics it is asked for, and a template where it cannot take the policy's tokens.

    Returns whether it can.
    """
    if ref.statistics != "none":
        read_statistics(source, ref.revision, f"{key}.statistics")
    own = own_tokenizer(job, ref, key)
    if reads_alike(own, tokenizer):
        return True
    own_template(own, f"{key}.{'from' if ref.from_ else 'path'}", source)
    return False


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
    fix: str,
) -> None:
    """A critic speaks of the policy's tokens one by one, and so does a reference: they must have its vocabulary.

    reads_text: the role has learned from rendered conversations, so its chat template (if it has one) must agree too.
    """
    own = load_tokenizer(source, ref.revision)
    ensure_pad(own, config)
    where = f"{key}.{'from' if ref.from_ else 'path'}"
    if chat.tokenizer_hash(own) != chat.tokenizer_hash(tokenizer):
        raise CheckpointError(f"expected the policy's tokenizer, found another one in {source}", where=where, fix=fix)
    if reads_text and own.chat_template and chat.template_hash(own) != chat.template_hash(tokenizer):
        what = f"expected the policy's chat template, found another one in {source}"
        raise CheckpointError(what, where=where, fix=f"{fix} Or leave out model.chat_template.")


def check_rewards(job: Job, tokenizer: PreTrainedTokenizerFast, prompts: list[PromptExample]) -> None:
    """Reward files load, addresses are reachable, templates take the prompts, and reference answers are there."""
    for key, spec in named_rewards(job.recipe):
        if isinstance(spec, (FunctionReward, ProcessReward)):
            load_function(spec.function)
        elif isinstance(spec, HttpReward):
            read_key(spec.api_key_env, f"{key}.api_key_env")
            check_reachable(spec.url, spec.timeout, f"{key}.url")
        elif isinstance(spec, ModelReward):
            check_rendering(job, tokenizer, spec, key, prompts)
        elif isinstance(spec, (ExactReward, NumericReward)):
            rule = bind(RULES, spec)
            for example in prompts:
                try:
                    rule([example.fields], [""])
                except DataError as error:
                    raise DataError(error.what, where=example.where, fix=error.fix) from None
    if isinstance(job.recipe, LabelRecipe) and isinstance(job.recipe.judge, EndpointBlock) and dist.is_main():
        check_service(job.recipe.judge)  # which rank 0 asks for all


def check_rendering(
    job: Job, tokenizer: PreTrainedTokenizerFast, spec: ModelReward, key: str, prompts: list[PromptExample]
) -> None:
    """A reward model's own template takes conversations with the roles of the prompts, one of each kind."""
    own = own_tokenizer(job, spec, key)
    if reads_alike(own, tokenizer):
        return
    template = chat.ChatTemplate(own)
    firsts: dict[tuple[str, ...], PromptExample] = {}
    for example in prompts:
        firsts.setdefault(tuple(message["role"] for message in example.fields["messages"]), example)
    for example in firsts.values():
        try:
            template.answered(example.fields["messages"], "a", example.where, finished=True)
        except DataError as error:
            what = f"expected prompts that its chat template takes, {error.what.partition('found ')[2]}"
            fix = "Change the rows, or name another reward model."
            raise DataError(what, where=f"{key}: {example.where}", fix=fix) from None


_COLUMNS = {"scores": "score_chosen and score_rejected", "win_rates": "win_rate_chosen and win_rate_rejected"}


def check_needs(job: Job, data: Loaded) -> None:
    """Every row has the numbers that a loss learns from beside the answers; a held-out one has what is measured."""
    recipe = job.recipe
    if not isinstance(recipe, PreferenceRecipe):
        return
    for block in recipe.losses:
        for need in set(block.needs) & set(_COLUMNS):
            lacking = [e.row for e in (*data.train, *data.eval) if getattr(e, need) is None]
            if lacking:
                raise DataError(
                    f"expected {_COLUMNS[need]} in every row for loss {block.name}, found {len(lacking)} rows without,"
                    f" the first is row {lacking[0]}",
                    where=recipe.data.key,
                    fix="`rlhf label` writes them: data: {from: label}. Or take a loss that needs none: rlhf losses.",
                )


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
