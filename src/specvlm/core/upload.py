"""Small numbers from the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def staged(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return [len(values)] on the host, fit for `Tensor.copy_(..., non_blocking=True)` to the device.

    From pageable memory a copy to a GPU waits for all work queued there; from pinned memory it queues behind it.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def upload(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return [len(values)] on the device."""
    return staged(values, device, dtype).to(device, non_blocking=True)
