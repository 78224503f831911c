"""Stage I of the paper alone."""

from __future__ import annotations

from torch import Tensor

from specvlm.prune.selection import pruner


@pruner("attention")
def attention(scores: Tensor, grid: Tensor, count: int) -> Tensor:
    """The tokens with most attention, up to the budget: stage I alone, whatever mass they cover."""
    return scores.topk(count).indices
