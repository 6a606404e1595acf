"""What losses need of the whole batch before the first gradient: a pass without gradient over all rows of all ranks.

KTO's reference point, BCO's shift, the dynamic beta of beta-DPO, the sorted partners of AOT, the values of DRO. The
policy is the same as in the update that follows, since a step of an offline stage has one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.masked import row_sums
from rlhf.batch import Answers
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import NotFiniteError, UserError
from rlhf.train import memory
from rlhf.train.loop import Collected
from rlhf.train.objectives import answer_logprobs, trim
from rlhf.train.pool import Budget, Pool, at_places
from rlhf.train.preference import Judged, Policy, PreferenceObjective, Term, flat, folded, prompt_values, view_of
from rlhf.train.seeding import derive
from rlhf.train.supervised import SupervisedCollector

logger = logging.getLogger("rlhf.preference")
_FALLING = 10  # steps in a row with most pairs displaced, before it is said


@dataclass
class PreferenceState:
    """Running numbers of coupled losses, by the loss's name. The same on every rank."""

    running: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"running": self.running}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `as_json` gave."""
        self.running = {name: dict(values) for name, values in saved["running"].items()}


@dataclass
class PreferenceCollector:
    """Rows of a seeded order, with what coupled losses need of them."""

    rows: SupervisedCollector
    objective: PreferenceObjective
    state: PreferenceState
    budget: Budget
    critic: Engine | None = None
    falling: int = 0  # steps in a row in which most pairs were displaced

    def collect(self, step: int) -> Collected:
        """The step's global batch."""
        collected = self.rows.collect(step)
        coupled = [term for term in self.objective.terms if term.couple is not None]
        if not coupled and self.critic is None:
            return collected
        (pool,) = collected.minibatches
        metrics: dict[str, float] = {}
        extras = self._extras(pool, coupled, step, metrics)

        def batch(places: list[int]) -> Any:
            return replace(pool.batch(places), extras={name: value[places] for name, value in extras.items()})

        return replace(collected, minibatches=[replace(pool, batch=batch)], metrics=metrics)

    def _extras(self, pool: Pool, coupled: list[Term], step: int, metrics: dict[str, float]) -> dict[str, Tensor]:
        """Numbers per row of the global batch, by the name under which losses ask for them."""
        batch = pool.batch(list(range(len(pool))))
        sums, lengths, mismatched, values = self._measure(pool, any(term.needs_mismatched for term in coupled))
        refuse_not_finite(sums, batch.row, step)
        extras: dict[str, Tensor] = {}
        if self.critic is not None:
            assert isinstance(batch, Answers) and batch.ref is not None
            extras |= {"values": values, "log_ratios": sums - batch.ref.to(sums)}
        view = view_of(batch, sums, lengths)
        draws = torch.tensor([uniform(self.rows.seed, step, row) for row in batch.row.tolist()])
        for term in coupled:
            assert term.couple is not None
            name = term.entry.name
            state = self.state.running[name] if name in self.state.running else {}
            more = (mismatched,) if term.needs_mismatched else ()
            found, self.state.running[name] = term.couple(view, state, *more, draws)
            for key, value in found.items():
                if value.dim() == 0:
                    metrics[f"coupling/{key}"] = float(value)
                extras[key] = value if value.dim() else value.expand(len(pool))
            metrics |= {f"coupling/{name}_{key}": value for key, value in self.state.running[name].items()}
        return {key: (value if value.dtype == torch.bool else value.float()).cpu() for key, value in extras.items()}

    def _measure(self, pool: Pool, wants_mismatched: bool) -> tuple[Tensor, ...]:
        """Log-prob sums and tokens of all answers, `folded`, log-ratios of mismatched rows, and values of prompts."""
        plain = Policy(self.objective.engine)
        micros, found = list(pool.cut(self.budget)), list[tuple[Tensor, ...]]()
        with memory.phase("the pass over the whole batch", "train.micro_tokens"), plain.engine.evaluating():
            for micro in micros:
                measured = plain(flat(micro.rows))
                sums, lengths = row_sums(measured.logprobs, measured.mask), measured.mask.sum(-1)
                both = (folded(micro.rows, sums), folded(micro.rows, lengths.to(sums.dtype)))
                found.append((*both, *self._others(micro.rows, wants_mismatched)))
        columns = [at_places(zip(micros, parts, strict=True), len(pool)) for parts in zip(*found, strict=True)]
        sums, lengths = columns[:2]
        mismatched = columns[2] if wants_mismatched else sums.new_zeros(0)
        return sums, lengths, mismatched, columns[-1] if self.critic is not None else sums.new_zeros(0)

    def _others(self, micro: Judged, wants_mismatched: bool) -> list[Tensor]:
        """Log-ratios of prompts with other rows' answers, and values of the prompts, each where it is wanted."""
        found: list[Tensor] = []
        if wants_mismatched:
            assert isinstance(micro, Answers) and micro.mismatched is not None and micro.ref_mismatched is not None
            engine = self.objective.engine
            logprobs = answer_logprobs(engine, trim(micro.mismatched).to(engine.device))
            found.append(logprobs - micro.ref_mismatched.to(logprobs))
        if self.critic is not None:
            assert isinstance(micro, Answers)
            with self.critic.evaluating():
                found.append(prompt_values(self.critic, micro))
        return found

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Hand the first minibatch's metrics to the stage's invariant check."""
        self.rows.guard(step, metrics)

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        """The loss as one number; and a word where both sides of most pairs have become less likely."""
        fell = metrics["train/both_fell"] if "train/both_fell" in metrics else 0.0
        self.falling = self.falling + 1 if fell > 0.5 else 0
        if self.falling == _FALLING and dist.is_main():
            logger.warning(
                "both answers of most pairs have become less likely than under the reference (both_fell %.2f, for %d"
                " steps): likelihood displacement. Look at train/logprobs_chosen; lower train.lr, raise beta, or take"
                " dpop or rpo_nll.",
                fell,
                _FALLING,
            )
        trained = {name: value for name, value in metrics.items() if name.startswith("train/")}
        return self.objective.total(trained), None


def refuse_not_finite(sums: Tensor, rows: Tensor, step: int) -> None:
    """Log-prob sums that are not finite would stay in running numbers for good: nothing is learned from the step.

    sums: (B,) or (B, K) of rows with these numbers of records, (B,).
    """
    bad = (~sums.isfinite()).view(len(sums), -1).any(-1)
    if bad.any():
        raise NotFiniteError(
            f"expected finite log-probs, found {int(bad.sum())} of {len(bad)} rows with others",
            found={"log-probs of answers": str(float(sums[~sums.isfinite()][0]))},
            rows=rows[bad.to(rows.device)].tolist(),
            where=f"step {step + 1}",
            fix="Lower train.lr, or look at these rows.",
        )


def uniform(seed: int, step: int, row: int) -> float:
    """A draw in (0, 1) that belongs to a row of the data in a step."""
    return (derive(seed, "couple", step, row) + 0.5) / 2**63
