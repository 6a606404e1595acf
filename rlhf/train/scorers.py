"""A recipe's rewards, ready to be asked: reward models under engines of their own, rules, functions, services."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf.batch import Rollout
from rlhf.data import chat
from rlhf.engine import dist
from rlhf.errors import CheckpointError, DataError
from rlhf.models.build import max_positions
from rlhf.models.load import read_config
from rlhf.models.statistics import read_statistics
from rlhf.models.tokenizer import decoder, ensure_pad, load_tokenizer
from rlhf.recipe.reward_options import HttpReward, ModelReward, ProcessReward, Reward
from rlhf.rewards.http import http_scores
from rlhf.rewards.rules import RULES
from rlhf.rewards.scorer import Cut, Part, Scorer, StepPart, model_part, rendered_part, rule_part, standardised
from rlhf.rewards.steps import process_part
from rlhf.train import roles
from rlhf.train.job import Job
from rlhf.train.objectives import bind
from rlhf.train.pool import Budget, own_passes
from rlhf.train.shared import SharedRoles
from rlhf.train.standing import leave_together

logger = logging.getLogger("rlhf.roles")


def scorer(
    job: Job,
    tokenizer: PreTrainedTokenizerFast,
    rewards: Sequence[Reward],
    *,
    key: str,
    shared: SharedRoles | None,
    budget: Budget,
) -> Scorer:
    """The rewards of one list of the recipe. Parts that share a kind are numbered: model, numeric, format, format_2.

    tokenizer: the policy's. key: the list's place in the recipe, rewards or test_rewards. shared: the models that stand
    on the policy's base.
    """
    parts: dict[str, Part] = {}
    step_parts: dict[str, StepPart] = {}
    weights: dict[str, float] = {}
    for i, spec in enumerate(rewards):
        same = sum(other.kind == spec.kind for other in rewards[:i])
        name = f"{spec.kind}_{same + 1}" if same else spec.kind
        weights[name] = spec.weight
        if isinstance(spec, ModelReward):
            parts[name] = _model(job, tokenizer, spec, f"{key}.{i}", name, shared, own_passes(budget))
        elif isinstance(spec, ProcessReward):
            step_parts[name] = process_part(spec.function, spec.separator, spec.timeout, decoder(tokenizer))
        elif isinstance(spec, HttpReward):
            parts[name] = rule_part(_service(spec, job.stop.check))
        else:
            parts[name] = rule_part(bind(RULES, spec))

    def ask(work: Callable[[], Any]) -> Any:
        leave_together(job.stop)
        return dist.agreed(work)

    return Scorer(parts, weights, step_parts, ask)


def reads_alike(own: PreTrainedTokenizerFast, policy: PreTrainedTokenizerFast) -> bool:
    """Whether a reward model can be given the policy's tokens as they are: one vocabulary, one template (or none)."""
    if chat.tokenizer_hash(own) != chat.tokenizer_hash(policy):
        return False
    return not own.chat_template or chat.template_hash(own) == chat.template_hash(policy)


def own_tokenizer(job: Job, spec: ModelReward, key: str) -> PreTrainedTokenizerFast:
    """A reward model's tokenizer, with a padding token that ends nothing."""
    source = job.source(key, spec)
    tokenizer, config = load_tokenizer(source, spec.revision), read_config(source, spec.revision)
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:  # rows that nobody has trained would be scored with
        raise CheckpointError(
            f"expected an embedding for each of the tokenizer's {len(tokenizer)} tokens, found {rows} in {source}",
            where=key,
            fix="Put a model and a tokenizer there that were trained together.",
        )
    ensure_pad(tokenizer, config)
    return tokenizer


def own_template(tokenizer: PreTrainedTokenizerFast, key: str, source: str) -> chat.ChatTemplate:
    """The chat template of a reward model that cannot be given the policy's tokens."""
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"expected the policy's tokenizer or a chat template, found neither in {source}",
            where=key,
            fix="Answers are rendered for it as text: put the template it was trained with there, chat_template.jinja.",
        )
    return chat.ChatTemplate(tokenizer)


def rendered(template: chat.ChatTemplate, rollout: Rollout) -> list[Any]:
    """Token ids of a rollout's prompts and answers as a template writes them, None where it cannot."""
    rows: list[Any] = []
    for row, text, finished in zip(rollout.rows, rollout.texts, rollout.finished.tolist(), strict=True):
        where = f"row {row['row']}"
        try:
            written = template.answered(row["messages"], text, where, finished=finished)
            rows.append(template.encode([written])[0][0])
        except DataError as error:
            logger.debug("%s", error)
            rows.append(None)
    return rows


def _model(
    job: Job,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelReward,
    key: str,
    name: str,
    shared: SharedRoles | None,
    cut: Cut,
) -> Part:
    source = job.source(key, spec)
    own = own_tokenizer(job, spec, key)
    is_alike = reads_alike(own, tokenizer)
    if shared is not None and key in shared.scores:
        score, engine = shared.scores[key], shared.actor
    else:
        score = engine = roles.score_engine(job, source, tokenizer if is_alike else own, spec, name)
    if is_alike:
        part = model_part(score, cut, engine.device)
    else:
        template = own_template(own, key, source)
        logger.info("reward %s: answers are rendered again for its own tokenizer and template", name)
        part = rendered_part(
            score,
            lambda rollout: rendered(template, rollout),
            pad_id=own.pad_token_id,
            room=max_positions(engine.module.core.config),
            cut=cut,
            device=engine.device,
        )
    if spec.statistics == "none":
        return part
    published = read_statistics(source, spec.revision, f"{key}.statistics")
    return standardised(part, published.mean, published.std if spec.statistics == "normalise" else 1.0)


def _service(spec: HttpReward, poll: Callable[[], None]) -> Any:
    """A scorer behind an address, in the shape of a rule. poll: raises where nobody waits for the scores any more."""
    options = {**spec.model_dump(exclude={"kind", "weight"}), "poll": poll}
    return lambda rows, answers: http_scores(rows, answers, **options)
