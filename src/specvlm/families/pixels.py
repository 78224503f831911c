"""From decoded frames to pixel tensors, in torch on any device, bit-equal to Hugging Face's torchvision processors.

The settings come from the checkpoint's own files; what they leave out is each family's DEFAULTS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specvlm.core.config import VideoConfig
from specvlm.core.errors import ConfigError, MediaError, UnsupportedModel

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# The values of the HF processor classes that all families share; a family's own DEFAULTS add to them.
COMMON_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
}

_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as the checkpoints write them
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
_FILES = {
    "image": ("preprocessor_config.json",),
    "video": ("video_preprocessor_config.json", "preprocessor_config.json"),
}
_MAX_ASPECT = 200  # Qwen's processors refuse longer frames
_PART = 1 << 24  # values normalised at once, 64 MiB in float32
_CHUNK = 32  # frames resized at once: bounds the memory of the float copy that a GPU needs


def read_json(directory: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a checkpoint's file, {} where there is no such file.

    Raises:
        UnsupportedModel: the file holds something else.
    """
    path = Path(directory) / name
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UnsupportedModel(f"{path} does not hold a JSON object ({error}): fetch the checkpoint again") from error


def stored_settings(directory: str, kind: str) -> dict[str, Any]:
    """Return what a checkpoint's files say about its "image" or "video" processor.

    Files are looked up in HF's order: processor_config.json holding both, then a file of its own; a video falls back
    to the image's file.

    Raises:
        UnsupportedModel: there is none: what the processor's class assumes is seldom what the model was trained with.
    """
    nested = read_json(directory, "processor_config.json").get(f"{kind}_processor")
    if isinstance(nested, dict):
        return nested
    for name in _FILES[kind]:
        if (Path(directory) / name).is_file():
            return read_json(directory, name)
    raise UnsupportedModel(
        f"{directory} has no {_FILES[kind][-1]}, which says how pixels are prepared: fetch it with the checkpoint, or "
        "copy it from the model that this one was tuned from"
    )


def processor_settings(directory: str, kind: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the "image" or "video" processor: a checkpoint's values over the defaults.

    Keys that `defaults` does not name decide no pixels and are left out.

    Raises:
        UnsupportedModel: there is no processor, or one that cannot be followed.
    """
    stored = stored_settings(directory, kind)
    merged = {**COMMON_DEFAULTS, **defaults}
    merged.update({key: stored[key] for key in merged if stored.get(key) is not None})
    if merged["resample"] not in _MODES:
        raise UnsupportedModel(f"{directory}: resample={merged['resample']} is not supported: known are {_MODES}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}


def video_processor(directory: str, default: str, known: Collection[str]) -> str:
    """Return the class of a checkpoint's video processor: named, else that of its image processor, else the model's.

    Raises:
        UnsupportedModel: it is none of the known.
    """
    stored = stored_settings(directory, "video")
    named = stored.get("video_processor_type")
    if named is None:
        of_image = str(stored.get("image_processor_type")).replace("ImageProcessor", "VideoProcessor")
        named = of_image if of_image in known else default
    if named not in known:
        raise UnsupportedModel(f"{directory}: video_processor_type={named!r} is not supported: known are {known}")
    return str(named)


def resize(frames: Tensor, size: tuple[int, int], resample: int, device: torch.device | str) -> Tensor:
    """Return frames uint8 [T, 3, H, W] resized to `size` (height, width), on `device`.

    A CPU resizes uint8 directly; elsewhere through float32, rounded and clamped, which is what torchvision does.
    """
    if frames.shape[-2:] == size:
        return frames.to(device)
    options: dict[str, Any] = {"mode": _MODES[resample]}
    if resample:
        options |= {"align_corners": False, "antialias": True}
    chunks = []
    for chunk in torch.split(frames, _CHUNK):
        chunk = chunk.to(device).contiguous()
        if resample and chunk.device.type != "cpu":
            resized = F.interpolate(chunk.float(), size, **options).clamp_(0, 255).round_().to(torch.uint8)
        else:
            resized = F.interpolate(chunk, size, **options)
        chunks.append(resized)
    return torch.cat(chunks)


def normalize(
    pixels: Tensor, settings: Mapping[str, Any], channel_dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return uint8 pixels rescaled and normalised as the flags say, in `dtype` unless neither is wanted.

    Rescaling is folded into mean and standard deviation, in float32 and in HF's order of operations; the result is
    rounded to `dtype` part by part, so that no float32 copy of a long video exists.
    """
    scale = settings["rescale_factor"] if settings["do_rescale"] else None
    if not settings["do_normalize"]:
        return pixels if scale is None else (pixels.to(torch.float32) * scale).to(dtype)
    moments = (settings[name] for name in ("image_mean", "image_std"))
    mean, std = (torch.tensor(each, dtype=torch.float32, device=pixels.device) for each in moments)
    if scale is not None:
        mean, std = mean * (1.0 / scale), std * (1.0 / scale)
    shape = [1] * pixels.ndim
    shape[channel_dim] = -1
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    rows = max(1, _PART * pixels.shape[0] // pixels.numel())
    for whole, part in zip(torch.split(out, rows), torch.split(pixels, rows), strict=True):
        whole.copy_(part.to(torch.float32).sub_(mean.view(shape)).div_(std.view(shape)))
    return out


@dataclass(frozen=True)
class Limits:
    """The caller's bounds on resized pixels, on top of the checkpoint's own."""

    max_pixels: int | None = None  # of one frame
    total_pixels: int | None = None  # of all frames of a video
    min_pixels: int | None = None  # of one frame
    exact: tuple[int, int] | None = None  # height and width of a frame, in place of all bounds

    @staticmethod
    def of(config: VideoConfig) -> Limits:
        """Return the bounds that settings ask for."""
        exact = None
        if config.resized_height is not None and config.resized_width is not None:
            exact = config.resized_height, config.resized_width
        return Limits(config.max_pixels, config.total_pixels, config.min_pixels, exact)

    @property
    def first(self) -> str | None:
        """The first of these settings that is there, as name=value."""
        if self.exact is not None:
            return f"resized_height={self.exact[0]}"
        given = ((name, getattr(self, name)) for name in ("max_pixels", "total_pixels", "min_pixels"))
        return next((f"{name}={value}" for name, value in given if value is not None), None)

    def per_frame(self, num_frames: int, least: int) -> int | None:
        """Return the most pixels that one of a video's frames may have, None without a bound.

        Raises:
            ConfigError: that is below `least`, the fewest that the model can see.
        """
        bounds = []
        for name, value, count in (("max_pixels", self.max_pixels, 1), ("total_pixels", self.total_pixels, num_frames)):
            if value is None:
                continue
            if value < least * count:
                remedy = f"at least {least * count} ({count} x {least}), or fewer frames"
                raise ConfigError(f"{name}={value} is not allowed for this model: {remedy}")
            bounds.append(value // count)
        return min(bounds, default=None)


@dataclass(frozen=True)
class Budget:
    """Bounds on frames x height x width, and the unit that both sides must be a multiple of."""

    cell: int  # pixels a side of one merged token
    low: int
    high: int
    frames: int = 1  # frames that share the budget: 1 where it holds for each frame by itself
    padded: int = 1  # the same, rounded to whole time steps as HF rounds it
    most: int | None = None  # the caller's bound on one frame, which holds for the longest frame too
    grows: bool = False  # a side below the cell is first scaled up to it, aspect kept (Qwen3-VL's videos)

    def lowered(self, per_frame: int | None) -> Budget:
        """Return the budget with at most `per_frame` pixels a frame."""
        if per_frame is None:
            return self
        high = min(self.high, per_frame * min(self.frames, self.padded))
        return replace(self, low=min(self.low, high), high=high, most=per_frame)

    def raised(self, min_pixels: int | None) -> Budget:
        """Return the budget with at least `min_pixels` a frame.

        Raises:
            ConfigError: that is above what the model or the caller allows.
        """
        if min_pixels is None:
            return self
        most = self.high // self.frames
        if min_pixels > most:
            raise ConfigError(f"min_pixels={min_pixels} is not allowed for this model: at most {most} a frame")
        return replace(self, low=max(self.low, min_pixels * self.frames))


def fit(height: int, width: int, budget: Budget) -> tuple[int, int]:
    """Return the (height, width) that a frame is resized to: multiples of the cell, within budget, aspect nearly kept.

    Raises:
        MediaError: the frame is more than 200 times longer than wide, or the reverse.
    """
    cell, shape = budget.cell, f"{width} x {height}"
    if budget.grows and min(height, width) < cell:
        growth = max(cell / height, cell / width)
        height, width = int(height * growth), int(width * growth)
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise MediaError(
            f"a frame of {shape} pixels is more than {_MAX_ASPECT} times longer than wide, "
            "which this model refuses: crop or pad it"
        )
    volume = budget.frames * height * width
    rows, columns = round(height / cell) * cell, round(width / cell) * cell
    if budget.padded * rows * columns > budget.high:
        shrink = math.sqrt(volume / budget.high)
        rows = max(cell, math.floor(height / shrink / cell) * cell)
        columns = max(cell, math.floor(width / shrink / cell) * cell)
    elif budget.padded * rows * columns < budget.low:
        grow = math.sqrt(budget.low / volume)
        rows, columns = math.ceil(height * grow / cell) * cell, math.ceil(width * grow / cell) * cell
        if budget.most is not None and rows * columns > budget.most:  # the caller's two bounds lie close together
            rows = max(cell, math.floor(height * grow / cell) * cell)
            columns = max(cell, math.floor(width * grow / cell) * cell)
    if budget.most is not None and rows * columns > budget.most:  # one side is a single cell
        longest = budget.most // (cell * cell) * cell
        rows, columns = min(rows, longest), min(columns, longest)
    return rows, columns


def exact_size(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """Return a wanted (height, width) in whole cells, within the bounds that qwen-vl-utils sets such sizes."""
    return fit(*size, Budget(cell, 4 * cell * cell, 16384 * cell * cell))


def pad_frames(frames: Tensor, multiple: int) -> Tensor:
    """Return frames [T, ...] with the last one repeated until T is a multiple."""
    missing = -frames.shape[0] % multiple
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])]) if missing else frames


def patchify(frames: Tensor, patch: int, temporal: int, merge: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut frames [T, 3, H, W] into Qwen's patches.

    Returns:
        patches [time * rows * columns, 3, temporal * patch * patch], the merge x merge patches of one token side by
        side, and the grid (time, rows, columns) in patches.

    Raises:
        MediaError: the frames are no multiple of patch * merge, in a checkpoint that does not resize.
    """
    height, width, cell = *frames.shape[2:], patch * merge
    if height % cell or width % cell:
        raise MediaError(
            f"a frame of {width} x {height} pixels is no multiple of {cell}, and this checkpoint says not to resize "
            f"(do_resize is false): resize it to a multiple"
        )
    steps, rows, columns = frames.shape[0] // temporal, height // patch, width // patch
    cut = frames.reshape(steps, temporal, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # step, row, column, both in merge, channel, time, y, x
    return cut.reshape(steps * rows * columns, 3, temporal * patch * patch), (steps, rows, columns)
