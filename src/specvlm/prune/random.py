"""Visual tokens at random."""

from __future__ import annotations

import torch
from torch import Tensor

from specvlm.prune.selection import pruner


@pruner("random", scored=False)
def random(scores: Tensor, grid: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Tokens at random, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(scores.shape[0], generator=generator)[:count].to(scores.device)
