"""Whole frames."""

from __future__ import annotations

import torch
from torch import Tensor

from specvlm.prune.selection import pruner
from specvlm.prune.spread import evenly


@pruner("frame", scored=False)
def frame(scores: Tensor, grid: Tensor, count: int) -> Tensor:
    """Whole time steps, evenly spaced; the last one is cut where the budget ends."""
    steps, inverse = torch.unique(grid[:, 0], return_inverse=True)
    number = min(steps.shape[0], -(-count * steps.shape[0] // scores.shape[0]))
    chosen = evenly(torch.arange(steps.shape[0], device=grid.device), grid, number, "sequence")
    kept = torch.isin(inverse, chosen).nonzero().squeeze(1)
    return kept[:count]
