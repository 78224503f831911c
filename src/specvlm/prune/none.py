"""No pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from specvlm.prune.selection import pruner


@pruner("none", scored=False)
def none(scores: Tensor, grid: Tensor, count: int) -> Tensor:
    """Keep every visual token: unpruned speculation."""
    return torch.arange(scores.shape[0], device=scores.device)
