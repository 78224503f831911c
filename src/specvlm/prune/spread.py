"""Places evenly spread over a video: what several pruners thin by."""

from __future__ import annotations

import torch
from torch import Tensor


def _spread(bits: Tensor) -> Tensor:
    """Put two zero bits between the bits of a number below 2^16 ([N] int64)."""
    for shift, mask in ((32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F),
                        (4, 0x10C30C30C30C30C3), (2, 0x1249249249249249)):  # fmt: skip
        bits = (bits | (bits << shift)) & mask
    return bits


def evenly(places: Tensor, grid: Tensor, count: int, spacing: str = "grid") -> Tensor:
    """Return `count` of `places` ([M] int64), evenly spread (SpecVLM, section 3.2, stage II).

    "grid" walks the time x row x column grid along a Z-order curve, which keeps near cells together, and takes steps of
    equal length on it: each kept token stands for a compact block of cells. "sequence" takes equal steps along the
    flattened sequence, as the authors' code does; a step that the row length divides then meets the same columns only.
    """
    total = places.shape[0]
    if count >= total:
        return places
    steps = (torch.arange(count, device=places.device) * total + total // 2) // count
    if spacing == "sequence":
        return places[steps]
    cells = grid[places]
    order = (_spread(cells[:, 0]) << 2 | _spread(cells[:, 1]) << 1 | _spread(cells[:, 2])).argsort(stable=True)
    return places[order[steps]]
