"""Triton kernels, each with a plain-torch reference beside it. Triton itself is imported when a kernel first runs."""

from functools import cache
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None  # it comes with torch's GPU builds; without it torch's own functions serve


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether a kernel can start while the one ahead of it drains: programmatic dependent launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
