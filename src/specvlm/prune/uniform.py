"""Stage II of the paper alone."""

from __future__ import annotations

import torch
from torch import Tensor

from specvlm.prune.selection import pruner
from specvlm.prune.spread import evenly


@pruner("uniform", scored=False)
def uniform(scores: Tensor, grid: Tensor, count: int, *, spacing: str = "grid") -> Tensor:
    """Stage II alone: tokens evenly spread."""
    return evenly(torch.arange(scores.shape[0], device=scores.device), grid, count, spacing)
