"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense): patches on a native-resolution grid, M-RoPE positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specvlm.errors import ConfigError
from specvlm.families.base import Inputs, Visual, register
from specvlm.families.common import Encoded, Limits, VisionFamily, cells
from specvlm.families.pixels import (
    HALF,
    Budget,
    fit,
    normalize,
    pad_frames,
    patchify,
    processor_settings,
    resize,
)
from specvlm.video import Frames

# What the HF processor classes assume where a checkpoint's files are silent.
_IMAGE_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "min_pixels": None,
    "max_pixels": None,
}
_VIDEO_DEFAULTS: dict[str, Any] = _IMAGE_DEFAULTS | {
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "cap_pixels_per_frame": False,
    "max_video_tokens": 128000,
}
_QWEN3_VIDEO_DEFAULTS: dict[str, Any] = _VIDEO_DEFAULTS | {
    "patch_size": 16,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "image_mean": HALF,
    "image_std": HALF,
    "max_video_tokens": 768,
}


def _bounds(settings: dict[str, Any]) -> tuple[int, int]:
    """Return the least and most pixels of a resized frame, whichever way the checkpoint spells them."""
    size = settings["size"]
    low = settings["min_pixels"] or size.get("shortest_edge") or size.get("min_pixels")
    high = settings["max_pixels"] or size.get("longest_edge") or size.get("max_pixels")
    return int(low), int(high)


def _lower(low: int, high: int, least: int, limits: dict[str, int | None]) -> tuple[int, int]:
    """Return the bounds lowered to the caller's limits.

    Raises:
        ConfigError: a limit is below `least`, the pixels of the smallest video that the model can see.
    """
    for name, limit in limits.items():
        if limit is None:
            continue
        if limit < least:
            raise ConfigError(f"{name}={limit} is below the least possible, {least}: raise it or read fewer frames")
        high = min(high, limit)
    return min(low, high), high


@register("qwen2_vl", "qwen2_5_vl")
class QwenVL(VisionFamily):
    """Qwen2-VL and Qwen2.5-VL: every frame has its own pixel budget; Qwen2.5-VL's positions count seconds."""

    is_mrope = True
    video_defaults = _VIDEO_DEFAULTS

    def __init__(self, directory: str, config: Any, tokenizer: Any) -> None:
        super().__init__(directory, config, tokenizer)
        self._has_seconds = config.model_type == "qwen2_5_vl"
        self._processors = {
            "image": processor_settings(directory, "image", _IMAGE_DEFAULTS),
            "video": processor_settings(directory, "video", self.video_defaults),
        }
        self.settings |= self._processors

    def _encode(self, media: Sequence[Frames], limits: Limits, device: torch.device | str) -> list[Encoded]:
        return [self._encode_one(frames, limits, device) for frames in media]

    def _encode_one(self, frames: Frames, limits: Limits, device: torch.device | str) -> Encoded:
        settings = self._processors[frames.kind]
        temporal, merge = settings["temporal_patch_size"], settings["merge_size"]
        pixels = frames.pixels
        if settings["do_resize"]:
            budget = (self._image_budget if frames.kind == "image" else self._video_budget)(len(pixels), limits)
            pixels = resize(pixels, self._size(pixels, budget), settings["resample"], device)
        patches, (steps, rows, columns) = patchify(
            pad_frames(pixels.to(device), temporal), settings["patch_size"], temporal, merge
        )
        visual = Visual(frames.kind, (steps, rows // merge, columns // merge))
        text, runs = self._runs(frames, visual)
        return Encoded(visual, normalize(patches, settings, 1).flatten(1), text, runs, temporal / frames.fps)

    def _size(self, pixels: Tensor, budget: Budget) -> tuple[int, int]:
        return fit(pixels.shape[-2], pixels.shape[-1], budget)

    def _image_budget(self, _: int, limits: Limits) -> Budget:
        settings = self._processors["image"]
        cell = settings["patch_size"] * settings["merge_size"]
        return Budget(cell, *_lower(*_bounds(settings), cell * cell, {"max_pixels": limits.max_pixels}))

    def _video_budget(self, num_frames: int, limits: Limits) -> Budget:
        """Return the bounds of one frame of a video."""
        settings = self._processors["video"]
        cell = settings["patch_size"] * settings["merge_size"]
        low, high = _bounds(settings)
        if settings["cap_pixels_per_frame"]:
            total = int(settings["max_video_tokens"] * cell * cell * 0.9)
            high = max(min(high, total * settings["temporal_patch_size"] // num_frames), int(low * 1.05))
        share = limits.total_pixels and limits.total_pixels // num_frames
        both = {"max_pixels": limits.max_pixels, f"total_pixels / {num_frames} frames": share}
        return Budget(cell, *_lower(low, high, cell * cell, both))

    def _runs(self, frames: Frames, visual: Visual) -> tuple[str, tuple[int, ...]]:
        """Return the text that stands for a visual and the tokens of each placeholder in it."""
        return self._tokens[visual.kind], (math.prod(visual.grid),)

    def _model_kwargs(self, kind: str, encoded: Sequence[Encoded]) -> dict[str, Any]:
        merge = self._processors[kind]["merge_size"]
        pixels = torch.cat([e.pixels for e in encoded])
        grids = [(e.visual.grid[0], e.visual.grid[1] * merge, e.visual.grid[2] * merge) for e in encoded]
        grid_thw = torch.tensor(grids, device=pixels.device)
        if kind == "image":
            return {"pixel_values": pixels, "image_grid_thw": grid_thw}
        kwargs: dict[str, Any] = {"pixel_values_videos": pixels, "video_grid_thw": grid_thw}
        if self._has_seconds:
            kwargs["second_per_grid_ts"] = torch.tensor([e.extra for e in encoded], device=pixels.device)
        return kwargs

    def _layouts(self, inputs: Inputs) -> list[Tensor]:
        return [cells(*visual.grid) for visual in inputs.visuals]


@register("qwen3_vl")
class Qwen3VL(QwenVL):
    """Qwen3-VL: one pixel budget for all frames of a video, and each merged frame's time written before it."""

    video_defaults = _QWEN3_VIDEO_DEFAULTS
