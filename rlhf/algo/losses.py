"""All preference losses: importing this registers those on pairs, on single answers and on lists."""

from __future__ import annotations

from rlhf.algo import listwise, pairwise, unpaired  # noqa: F401  what registers them
from rlhf.algo.preference import PREFERENCE_LOSSES

__all__ = ["PREFERENCE_LOSSES"]
