"""Path, URL, bytes, array or list of images -> Frames."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one video, or one image."""

    pixels: Tensor  # [T, 3, H, W] uint8, RGB
    seconds: Tensor  # [T] float64, the time of each frame
    fps: float  # frames a second among these frames (the sampling rate, not the file's)
    kind: str = "video"  # "video" or "image" (T = 1)
