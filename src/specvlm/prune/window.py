"""One stretch of the visual tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specvlm.prune.selection import pruner


@pruner("window", scored=False)
def window(scores: Tensor, grid: Tensor, count: int, *, window: str = "middle") -> Tensor:
    """One stretch of the sequence: its front, middle or back."""
    start = {"front": 0, "middle": (scores.shape[0] - count) // 2, "back": scores.shape[0] - count}[window]
    return torch.arange(start, start + count, device=scores.device)
