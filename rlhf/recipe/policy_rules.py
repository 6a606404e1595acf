"""Rules of on-policy recipes: which estimators, losses, reductions and KL terms make sense together, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf.recipe.policy_options import AdaptiveKl, PpoPenaltyLoss, ScoresBlock
from rlhf.recipe.problems import Problem
from rlhf.recipe.reward_options import ProcessReward
from rlhf.recipe.stages import GRPORecipe, OnlineRecipe, PPORecipe

Problems = Iterator[Problem]


def estimator_and_critic(recipe: OnlineRecipe) -> Problems:
    """A critic is trained where the estimator uses it, and nowhere else."""
    name = recipe.advantage.name
    has_critic = isinstance(recipe, PPORecipe)
    if recipe.advantage.needs_critic and not has_critic:
        what = f"expected an estimator without a critic, found {name}"
        yield Problem("advantage.name", what, "this stage trains no critic: use rlhf ppo, or another estimator")
    if has_critic and not recipe.advantage.needs_critic:
        what = f"expected gae, found {name}, which has no use for the critic that this stage trains"
        yield Problem("advantage.name", what, "use rlhf grpo, which trains none")


def estimator_and_group(recipe: OnlineRecipe) -> Problems:
    """One answer has nothing to be compared with."""
    if recipe.advantage.needs_group and recipe.train.answers < 2 and not isinstance(recipe, PPORecipe):
        what = f"expected at least 2 for advantage {recipe.advantage.name}, found {recipe.train.answers}"
        fix = "raise it, or choose reinforce, reinforce_pp or remax, which need no group"
        yield Problem("train.answers", what, fix, ("advantage.name",))


def estimator_and_steps(recipe: OnlineRecipe) -> Problems:
    """Step scores come from a reward that gives them, and are not scores of answers."""
    if not recipe.advantage.needs_steps:
        return
    name = recipe.advantage.name
    if not any(isinstance(reward, ProcessReward) for reward in recipe.rewards):
        what = f"expected one of kind process for advantage {name}, found none"
        yield Problem("rewards", what, "add a process reward, or choose advantage grpo", ("advantage.name",))
    if recipe.kl.placement == "reward" and recipe.kl.coef:
        what = f"expected loss with advantage {name}, which sees the scores of steps only, found reward"
        yield Problem("kl.placement", what, "set it to loss", ("advantage.name",))
    for key, info in ScoresBlock.model_fields.items():
        found = getattr(recipe.scores, key)
        if key != "drop_unfinished" and found != info.default:
            what = (
                f"expected nothing with advantage {name}, which sees the scores of steps, not of answers, found {found}"
            )
            yield Problem(f"scores.{key}", what, "remove it", ("advantage.name",))


def whitened_rewards(recipe: OnlineRecipe) -> Problems:
    """Whitening token rewards changes nothing that a sum over the answer would notice."""
    if recipe.whiten_rewards and (not recipe.advantage.per_token or recipe.advantage.needs_steps):
        what = f"expected false with advantage {recipe.advantage.name}, which does not read token rewards, found true"
        yield Problem("whiten_rewards", what, "use gae or reinforce_pp, or scores.normalise", ("advantage.name",))


def kl_in_loss(recipe: OnlineRecipe) -> Problems:
    """k1 has an expected gradient of 0: as a loss it does nothing but add noise."""
    if recipe.kl.placement == "loss" and recipe.kl.estimator == "k1" and recipe.kl.coef:
        what = "expected k2, k3 or abs where the KL is a term of the loss, found k1, whose expected gradient is 0"
        yield Problem("kl.estimator", what, "choose k3, or set kl.placement to reward", ("kl.placement",))


def kl_control(recipe: OnlineRecipe) -> Problems:
    """A controller multiplies: from 0 it never gets away."""
    if isinstance(recipe.kl.controller, AdaptiveKl) and not recipe.kl.coef:
        what = "expected a number > 0 for an adaptive controller to start from, found 0"
        yield Problem("kl.coef", what, "0.2 is usual", ("kl.controller.name",))
    rows = recipe.train.prompts * recipe.train.answers
    if isinstance(recipe.kl.controller, AdaptiveKl) and recipe.kl.controller.horizon <= 0.2 * rows:
        what = f"expected more than a fifth of the {rows} answers of a rollout, found {recipe.kl.controller.horizon:g}"
        fix = f"one rollout could take the coefficient to 0: {10 * rows} changes it by 2 % per rollout at most"
        yield Problem("kl.controller.horizon", what, fix, ("train.prompts", "train.answers"))


def fresh_samples(recipe: OnlineRecipe) -> Problems:
    """A loss without a probability ratio is the policy gradient on fresh samples only."""
    train = recipe.train
    if recipe.policy_loss.only_fresh and train.inner_epochs * train.minibatches > 1:
        key = "train.inner_epochs" if train.inner_epochs > 1 else "train.minibatches"
        what = f"expected 1 with policy_loss {recipe.policy_loss.name}, found {getattr(train, key[6:])}"
        fix = (
            "it has no probability ratio, so only the first update on a rollout is right: set it to 1, or use ppo_clip"
        )
        yield Problem(key, what, fix, ("policy_loss.name",))


def penalty_needs_updates(recipe: OnlineRecipe) -> Problems:
    """At the first update on a rollout the policy is the one that sampled, and the penalty has no gradient."""
    train = recipe.train
    if isinstance(recipe.policy_loss, PpoPenaltyLoss) and train.inner_epochs * train.minibatches == 1:
        what = "expected several updates per rollout for ppo_penalty, whose penalty is 0 at the first, found 1"
        fix = "raise train.inner_epochs or train.minibatches, or use ppo_clip"
        yield Problem("train.inner_epochs", what, fix, ("policy_loss.name", "train.minibatches"))


def early_stop_needs_updates(recipe: OnlineRecipe) -> Problems:
    """At the first update the policy has not moved, and there is no second one to leave out."""
    train = recipe.train
    if train.target_kl is not None and train.inner_epochs * train.minibatches == 1:
        what = f"expected nothing with one update per rollout, found {train.target_kl:g}"
        fix = "it ends the updates on a rollout: raise train.inner_epochs or train.minibatches, or remove it"
        yield Problem("train.target_kl", what, fix, ("train.inner_epochs", "train.minibatches"))


def whitened_twice(recipe: OnlineRecipe) -> Problems:
    """REINFORCE++ whitens by itself."""
    name = recipe.advantage.name
    if recipe.whiten_advantages and name in ("reinforce_pp", "reinforce_pp_baseline"):
        what = f"expected false with advantage {name}, which whitens by itself, found true"
        yield Problem("whiten_advantages", what, "remove it", ("advantage.name",))


def sequence_losses(recipe: OnlineRecipe) -> Problems:
    """A loss with one number per answer is averaged over answers."""
    name = recipe.policy_loss.name
    if recipe.policy_loss.per_sequence and recipe.aggregation != "sequence_mean":
        what = f"expected sequence_mean with policy_loss {name}, found {recipe.aggregation}"
        fix = f"{name} gives one number per answer; any other sum would weigh answers by their length"
        yield Problem("aggregation", what, fix, ("policy_loss.name",))
    has_kl = recipe.kl.placement == "reward" and recipe.kl.coef > 0
    if recipe.policy_loss.per_sequence and recipe.advantage.name == "remax" and has_kl:
        what = f"expected loss with advantage remax and policy_loss {name}, found reward"
        fix = f"remax takes the KL off token by token, {name} moves whole answers: set it to loss, or use ppo_clip"
        yield Problem("kl.placement", what, fix, ("advantage.name", "policy_loss.name"))
    if recipe.policy_loss.per_sequence and recipe.advantage.per_token:
        what = f"expected an estimator of whole answers with policy_loss {name}, found {recipe.advantage.name}"
        fix = f"{name} moves whole answers; use grpo, rloo, reinforce or remax"
        yield Problem("advantage.name", what, fix, ("policy_loss.name",))


def refills(recipe: OnlineRecipe) -> Problems:
    """Only groups can be flat."""
    compares = recipe.advantage.needs_group and not recipe.advantage.needs_steps
    if recipe.train.max_refills and not (compares and recipe.train.answers > 1):
        what = f"expected 0 with advantage {recipe.advantage.name}, which does not compare whole answers of a group"
        fix = "refills replace groups of equal scores: use grpo, dr_grpo or rloo, or set it to 0"
        yield Problem("train.max_refills", f"{what}, found {recipe.train.max_refills}", fix, ("advantage.name",))


def score_options(recipe: OnlineRecipe) -> Problems:
    """Penalties that can be felt, and do not contradict each other."""
    scores, longest = recipe.scores, recipe.sampling.max_new_tokens
    if scores.overlong_buffer >= longest and scores.overlong_buffer:
        what = f"expected less than sampling.max_new_tokens = {longest}, found {scores.overlong_buffer}"
        also = ("sampling.max_new_tokens",)
        yield Problem("scores.overlong_buffer", what, "the penalty begins so many tokens before the limit", also)
    if scores.overlong_penalty != ScoresBlock.model_fields["overlong_penalty"].default and not scores.overlong_buffer:
        what = (
            f"expected scores.overlong_buffer, without which this makes {scores.overlong_penalty:g} nothing, found none"
        )
        yield Problem("scores.overlong_penalty", what, "set the buffer, or remove it", ("scores.overlong_buffer",))
    if scores.drop_unfinished and (scores.missing_eos_penalty or scores.missing_eos_score is not None):
        what = "expected no price on answers that are left out of the loss, found both"
        keys = ("scores.missing_eos_penalty", "scores.missing_eos_score")
        yield Problem("scores.drop_unfinished", what, "drop unfinished answers, or let them pay", keys)
    if scores.missing_eos_score is not None and scores.missing_eos_penalty:
        what = "expected one of missing_eos_penalty and missing_eos_score, found both"
        yield Problem("scores.missing_eos_score", what, "remove one of them", ("scores.missing_eos_penalty",))


def opponents(recipe: OnlineRecipe) -> Problems:
    """Every answer that is scored has an opponent, and the KL of Nash-MD is part of what is compared."""
    if not isinstance(recipe, GRPORecipe) or recipe.opponent is None:
        return
    name, also = recipe.advantage.name, ("opponent",)
    if recipe.advantage.needs_greedy or recipe.advantage.needs_steps:
        scored = "steps" if recipe.advantage.needs_steps else "a greedy answer"
        what = f"expected an estimator of whole answers' scores with opponent, found {name}, which scores {scored} too"
        yield Problem("advantage.name", what, "reinforce is Nash-MD's own", also)
    if recipe.kl.placement == "loss":
        what = "expected reward with opponent, found loss"
        yield Problem("kl.placement", what, "Nash-MD takes the KL of the whole answer off its score", also)


def critic_warmup(recipe: OnlineRecipe) -> Problems:
    """The policy moves some day."""
    if isinstance(recipe, PPORecipe) and recipe.critic.warmup_rollouts >= recipe.train.rollouts:
        what = f"expected less than train.rollouts = {recipe.train.rollouts}, found {recipe.critic.warmup_rollouts}"
        yield Problem("critic.warmup_rollouts", what, "else the policy never learns", ("train.rollouts",))


def pretraining_rows(recipe: OnlineRecipe) -> Problems:
    """Rows that are mixed in are all trained on."""
    if recipe.pretraining is None:
        return
    if recipe.pretraining.data.eval is not None or recipe.pretraining.data.eval_rows:
        key = "eval_rows" if recipe.pretraining.data.eval_rows else "eval"
        what = "expected no held-out rows, found some"
        yield Problem(f"pretraining.data.{key}", what, "remove it: nothing is evaluated on them")


POLICY_RULES: tuple[Callable[[OnlineRecipe], Problems], ...] = (
    estimator_and_critic,
    estimator_and_group,
    estimator_and_steps,
    whitened_rewards,
    kl_in_loss,
    kl_control,
    fresh_samples,
    penalty_needs_updates,
    early_stop_needs_updates,
    whitened_twice,
    sequence_losses,
    refills,
    score_options,
    opponents,
    critic_warmup,
    pretraining_rows,
)
