"""What is minimised: each objective turns a micro-batch into a `Loss` (sums) through its engine.

`counts` gives the local denominators of a whole minibatch; the loop adds them over ranks before the first backward.
Metric names get the objective's group in front (`train/`, `policy/`, `value/`), or `eval/` on held-out rows; a name
with a group of its own keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rlhf.algo.aggregation import AGGREGATIONS, DENOMINATORS
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.masked import masked_sum
from rlhf.algo.policy import POLICY_LOSSES
from rlhf.algo.registry import Registry
from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.algo.sft import sft
from rlhf.algo.value import VALUE_LOSSES
from rlhf.batch import Experience, Loss, Pairs, Tokens
from rlhf.engine.engine import Engine
from rlhf.models.head import Extras
from rlhf.recipe.schema import Block, OptimBlock, SamplingBlock
from rlhf.recipe.stages import OnlineRecipe
from rlhf.train.state import OnlineState


class Objective(Protocol):
    """One trained engine and the loss it minimises."""

    group: ClassVar[str]
    optional: ClassVar[frozenset[str]]  # denominators that a minibatch may have none of
    engine: Engine
    optim: OptimBlock

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Local denominators of a minibatch: name -> scalar."""

    def loss(self, micro: Any) -> Loss:
        """The loss of a micro-batch as sums."""


def bind(registry: Registry, block: Block) -> Callable[..., Any]:
    """The registered function that a recipe block chose, with the block's options filled in."""
    chosen = next(key for key in ("name", "kind") if key in type(block).model_fields)
    skipped = (chosen, "weight", *block.not_arguments)
    options = {key: getattr(block, key) for key in type(block).model_fields if key not in skipped}
    return partial(registry[getattr(block, chosen)].function, **options)


@dataclass(frozen=True)
class SFTObjective:
    """Negative log-likelihood of the supervised tokens, averaged over the tokens of the global batch."""

    optional: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str] = "train"
    engine: Engine
    optim: OptimBlock

    def counts(self, batch: Tokens) -> dict[str, Tensor]:
        return {"tokens": batch.mask[:, 1:].sum(), "rows": torch.tensor(len(batch))}

    def loss(self, micro: Tokens) -> Loss:
        nll, num_tokens = supervised_nll(self.engine, micro)
        return Loss({"nll": (nll, "tokens", 1.0)}, {"loss": (nll, "tokens"), "tokens_per_row": (num_tokens, "rows")})


def supervised_nll(engine: Engine, micro: Tokens) -> tuple[Tensor, Tensor]:
    """(summed negative log-likelihood of the supervised tokens, how many they are)."""
    tokens = trim(micro).to(engine.device)
    mask = trained(tokens.mask)
    return masked_sum(sft(engine(tokens.ids, tokens.attention, mask), mask), mask), mask.sum()


@dataclass(frozen=True)
class RewardObjective:
    """A pairwise loss on the scores of both answers, averaged over pairs."""

    optional: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str] = "train"
    engine: Engine
    optim: OptimBlock
    pair_loss: Callable[..., Tensor]

    @classmethod
    def from_block(cls, engine: Engine, optim: OptimBlock, block: Block) -> RewardObjective:
        return cls(engine, optim, bind(REWARD_LOSSES, block))

    def counts(self, batch: Pairs) -> dict[str, Tensor]:
        return {"pairs": torch.tensor(len(batch))}

    def loss(self, micro: Pairs) -> Loss:
        both = trim(join(micro)).to(self.engine.device)
        chosen, rejected = self.engine(both.ids, both.attention).chunk(2)  # (b,) each
        total = micro.weighted(self.pair_loss(chosen, rejected, micro.margin.to(chosen.device))).sum()
        metrics = {
            "loss": total,
            "accuracy": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "score_chosen": chosen.sum(),
            "score_rejected": rejected.sum(),
        }
        return Loss({"pairs": (total, "pairs", 1.0)}, {name: (value, "pairs") for name, value in metrics.items()})


@dataclass(frozen=True)
class PolicyObjective:
    """A policy-gradient loss on fresh samples; the KL to the reference and the entropy are optional further terms."""

    optional: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str] = "policy"
    engine: Engine
    optim: OptimBlock
    policy_loss: Callable[..., tuple[Tensor, Tensor]]
    reduce: Callable[[Tensor, Tensor], Tensor]  # adds up losses (b, R)
    denominator: str
    sampling: SamplingBlock
    kl: Callable[[Tensor, Tensor], Tensor] | None  # the estimator, where the KL is a term of the loss
    entropy_coef: float
    state: OnlineState

    @classmethod
    def from_recipe(cls, engine: Engine, recipe: OnlineRecipe, state: OnlineState) -> PolicyObjective:
        """As the recipe says; coefficients that a controller moves are read from the state."""
        return cls(
            engine,
            recipe.train,
            bind(POLICY_LOSSES, recipe.policy_loss),
            partial(AGGREGATIONS[recipe.aggregation].function, length=recipe.sampling.max_new_tokens),
            DENOMINATORS[recipe.aggregation],
            recipe.sampling,
            KL_ESTIMATORS[recipe.kl.estimator].function if recipe.kl.placement == "loss" else None,
            recipe.entropy_coef,
            state,
        )

    def counts(self, batch: Experience) -> dict[str, Tensor]:
        return experience_counts(batch)

    def loss(self, micro: Experience) -> Loss:
        experience = trim_experience(micro).to(self.engine.device)
        mask = experience.response_mask
        extras = Extras(entropy="gradient" if self.entropy_coef else "value")
        logprobs, entropy = self.engine(
            experience.ids, experience.attention, mask, sampling=self.sampling, extras=extras
        )
        first_seen: dict[str, tuple[Tensor, str]] = {}
        if experience.old_logprobs is None:  # this is the policy that sampled
            assert experience.sample_logprobs is not None, "nothing to compare the sampler with"
            experience = replace(experience, old_logprobs=logprobs.detach())
            first_seen = distances(logprobs.detach(), experience.ref_logprobs, experience.sample_logprobs, mask)
        moved = {} if self.state.penalty_beta is None else {"beta": self.state.penalty_beta}
        losses, clipped = self.policy_loss(logprobs, experience.old_logprobs, experience.advantages, mask, **moved)
        policy = self.reduce(losses, mask)
        terms = {"policy": (policy, self.denominator, 1.0)}
        metrics = {"loss": (policy, self.denominator), **policy_metrics(logprobs.detach(), clipped, experience)}
        metrics.update(first_seen)
        metrics["entropy"] = (masked_sum(entropy, mask), "tokens")
        if self.entropy_coef:
            terms["entropy"] = (*metrics["entropy"], -self.entropy_coef)
        if self.kl is not None:
            kl = self.reduce(self.kl(logprobs, experience.ref_logprobs), mask)
            terms["kl"] = (kl, self.denominator, self.state.kl_coef)
            metrics["kl_loss"] = (kl, self.denominator)
        return Loss(terms, metrics)


def policy_metrics(logprobs: Tensor, clipped: Tensor, experience: Experience) -> dict[str, tuple[Tensor, str]]:
    """How far the policy has moved from the one that sampled, and where that is held back."""
    mask, old = experience.response_mask, experience.old_logprobs
    assert old is not None, "old log-probs are missing"
    is_good = experience.advantages > 0
    values = {
        "clipfrac": clipped.float(),
        "clipfrac_high": (clipped & is_good).float(),
        "clipfrac_low": (clipped & ~is_good).float(),
        "approx_kl": KL_ESTIMATORS["k2"].function(logprobs, old),
        "kl_old": KL_ESTIMATORS["k3"].function(old, logprobs),  # of KL(old || policy), on the old policy's samples
        "logprob_change": (logprobs - old).abs(),
    }
    return {name: (masked_sum(value, mask), "tokens") for name, value in values.items()}


def distances(old: Tensor, ref: Tensor, sample: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, str]]:
    """How far the policy that sampled is from the reference, and from what its sampler said. All (b, R)."""
    kl = KL_ESTIMATORS["k1"].function(old, ref)
    return {
        "rollout/kl_ref": (masked_sum(kl, mask), "sequences"),
        "rollout/ref_gap": (masked_sum(kl.abs(), mask), "tokens"),
        "rollout/sampler_gap": (masked_sum((old - sample).abs(), mask), "tokens"),
    }


@dataclass(frozen=True)
class PretrainingObjective:
    """PPO-ptx: the supervised loss of rows that go with a minibatch of answers.         [arXiv:2203.02155 eq. 2]

    Its gradient is added to the policy's before their common step. The rows have a forward pass of their own.
    """

    optional: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str] = "ptx"
    engine: Engine
    optim: OptimBlock
    coef: float

    def counts(self, batch: Tokens) -> dict[str, Tensor]:
        return {"tokens": batch.mask[:, 1:].sum()}

    def loss(self, micro: Tokens) -> Loss:
        nll = supervised_nll(self.engine, micro)[0]
        return Loss({"nll": (nll, "tokens", self.coef)}, {"loss": (nll, "tokens")})


@dataclass(frozen=True)
class ValueObjective:
    """The critic's clipped squared error, averaged over the response tokens of the global minibatch."""

    optional: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str] = "value"
    engine: Engine
    optim: OptimBlock
    value_loss: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def from_block(cls, engine: Engine, optim: OptimBlock, block: Block) -> ValueObjective:
        return cls(engine, optim, bind(VALUE_LOSSES, block))

    def counts(self, batch: Experience) -> dict[str, Tensor]:
        return experience_counts(batch)

    def loss(self, micro: Experience) -> Loss:
        experience = trim_experience(micro).to(self.engine.device)
        assert experience.old_values is not None and experience.returns is not None, "PPO needs values and returns"
        mask = experience.response_mask
        values = self.engine(experience.ids, experience.attention, mask)  # (b, R)
        losses, clipped = self.value_loss(values, experience.old_values, experience.returns, mask)
        total = masked_sum(losses, mask)
        return Loss(
            {"value": (total, "tokens", 1.0)},
            {"loss": (total, "tokens"), "clipfrac": (masked_sum(clipped.float(), mask), "tokens")},
        )


# --- layout ---------------------------------------------------------------------------------------------------------


def experience_counts(batch: Experience) -> dict[str, Tensor]:
    """Response tokens, and answers that have any (an unscored answer has none)."""
    return {"tokens": batch.response_mask.sum(), "sequences": batch.response_mask.any(-1).sum()}


def join(pairs: Pairs) -> Tokens:
    """Chosen rows above rejected rows: (2b, T)."""
    width = max(pairs.chosen.ids.shape[1], pairs.rejected.ids.shape[1])

    def stack(name: str) -> Tensor:
        sides = [getattr(pairs.chosen, name), getattr(pairs.rejected, name)]
        return torch.cat([torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides])

    return Tokens(stack("ids"), stack("attention"), stack("mask"))


def trim(tokens: Tokens) -> Tokens:
    """Without the columns that are padding in every row."""
    width = int(tokens.attention.sum(-1).max())
    return tokens.map(lambda value: value[:, :width])


def trim_experience(experience: Experience) -> Experience:
    """Without prompt columns and response columns that are padding in every row."""
    responses = experience.response_mask.shape[1]
    left, right = padding_columns(experience.attention, responses)

    def cut(value: Tensor) -> Tensor:
        if value.dim() == 1:
            return value
        return value[:, left if value.shape[1] > responses else 0 : value.shape[1] - right]

    return experience.map(cut)


def padding_columns(attention: Tensor, responses: int) -> tuple[int, int]:
    """(columns at the left, columns at the right) that are padding in every row; one response column stays."""
    prompts = attention.shape[1] - responses
    left = prompts - int(attention[:, :prompts].sum(-1).max())
    return left, responses - max(1, int(attention[:, prompts:].sum(-1).max()))


def trained(mask: Tensor) -> Tensor:
    """(B, T) -> (B, R): the columns from the first that counts in any row, and never the first of a sequence.

    A sequence's first token is predicted from nothing.
    """
    return mask[:, max(1, int(mask.any(0).int().argmax())) :]


def answer_logprobs(engine: Engine, tokens: Tokens, **options: Any) -> Tensor:
    """Summed log-probs of the tokens under the mask, (B,)."""
    logprobs: Tensor = engine(tokens.ids, tokens.attention, trained(tokens.mask), **options)
    return logprobs.sum(-1)
