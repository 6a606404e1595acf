"""Who a policy's answers are compared with: a mixture of itself and its reference (Nash-MD)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from rlhf.engine.engine import Engine
from rlhf.models.mixture import Mixture
from rlhf.models.shared import POLICY, SharedModule
from rlhf.train.reference import Reference


@dataclass(frozen=True)
class Opponent:
    """policy^(1 - mixture) * reference^mixture, token by token.                          [arXiv:2312.00886 sec. 7]"""

    actor: Engine
    reference: Reference
    mixture: float

    @contextmanager
    def gathered(self) -> Iterator[Mixture]:
        """The mixture with whole weights, to be sampled from."""
        with self.actor.gathered() as policy:
            if self.reference.role is not None:
                yield Mixture(policy, policy, self.mixture, partial(playing, policy, self.reference.role))
            elif self.reference.is_base:
                yield Mixture(policy, policy, self.mixture, policy.adapter_off)
            else:
                with self.reference.engine.gathered() as reference:
                    yield Mixture(policy, reference, self.mixture, nullcontext)


@contextmanager
def playing(module: SharedModule, role: str) -> Iterator[None]:
    """Inside, a module of several roles plays this one; outside, the policy."""
    module.use(role)
    try:
        yield
    finally:
        module.use(POLICY)
