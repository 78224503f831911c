"""Frames, and what is already in memory: arrays, tensors and Frames."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from specvlm.core.byvalue import ByValue
from specvlm.core.config import DEFAULT_FPS, VideoConfig
from specvlm.core.errors import MediaError, SpecVLMWarning

MAX_FRAME_BYTES = 16 << 30
_MOST_TIMES = 10_000_000  # at which frames in memory are looked for


class MediaWarning(SpecVLMWarning):
    """A file is damaged, but holds frames that can be used."""


@dataclass(frozen=True, eq=False)
class Frames(ByValue):
    """Decoded frames of one video, or one image."""

    pixels: Tensor  # [T, 3, H, W] uint8, RGB
    seconds: Tensor  # [T] float64, the time of each frame
    fps: float  # frames a second among these frames (the sampling rate, not the file's)
    kind: str = "video"  # "video" or "image" (T = 1)


Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Source: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | Array | Tensor | Image.Image | Sequence[Any] | Frames
)  # fmt: skip
Data: TypeAlias = str | bytes  # a path, or the file's bytes


def still(pixels: Tensor, config: VideoConfig, kind: str) -> Frames:
    """Return one picture [3, H, W] as Frames."""
    return Frames(pixels[None], torch.zeros(1, dtype=torch.float64), config.fps or DEFAULT_FPS, kind)


def from_frames(frames: Frames, config: VideoConfig, kind: str) -> Frames:
    """Return the part and the share of the frames that the config asks for; loading twice changes nothing."""
    _check_frames(frames)
    frames = replace(frames, seconds=frames.seconds.detach().double())
    if kind == "image":
        return replace(one_image(frames.pixels, "Frames"), seconds=frames.seconds, fps=frames.fps)
    seconds, last = frames.seconds.cpu().numpy(), float(frames.seconds[-1])
    end = min(last + 1 / frames.fps, config.end or math.inf)
    check_start(config, end, "Frames")
    first = max(int(np.searchsorted(seconds, config.start + 1e-6, "right")) - 1, 0)
    index = np.arange(first, max(int(np.searchsorted(seconds, end - 1e-6)), first + 1))
    fps = frames.fps
    wanted = None if config.fps is None else max(config.fps, (config.min_frames or 0) / (end - config.start))
    if wanted is not None and wanted < fps * (1 - 1e-6):
        if (end - config.start) * wanted > _MOST_TIMES:
            problem = f"Frames: {end - config.start:g} s at fps={wanted:g} are more than {_MOST_TIMES:,} times"
            raise MediaError(f"{problem}: give fewer (fps, start, end, num_frames)")
        times = regular(config.start, end, wanted, slack=1e-6)
        index, fps = np.maximum(np.searchsorted(seconds, times + 1e-6, "right") - 1, first), wanted
    thin = _thinned(len(index), config)
    if len(thin) == len(frames.seconds):
        return replace(frames, kind=kind)
    chosen = torch.from_numpy(index[thin])
    pixels = frames.pixels[chosen.to(frames.pixels.device)]
    return Frames(pixels, frames.seconds[chosen.to(frames.seconds.device)], fps * len(thin) / len(index), kind)


def _check_frames(frames: Frames) -> None:
    """Raise MediaError where a caller's Frames are not what they should be."""
    pixels, seconds, fps = frames.pixels, frames.seconds, frames.fps
    if not isinstance(pixels, Tensor):
        raise MediaError(f"Frames.pixels is a {type(pixels).__name__}: give a uint8 tensor [T, 3, H, W]")
    as_pixels(pixels, "Frames.pixels", axes=4)
    if pixels.shape[1] != 3:
        raise MediaError(f"Frames.pixels has shape {list(pixels.shape)}: give [T, 3, H, W]")
    if not isinstance(seconds, Tensor) or seconds.shape != pixels.shape[:1] or not seconds.is_floating_point():
        shown = list(seconds.shape) if isinstance(seconds, Tensor) else type(seconds).__name__
        raise MediaError(f"Frames.seconds is {shown}: give one float of seconds a frame, [{len(pixels)}]")
    if (fault := _not_plain(seconds)) is not None:
        raise MediaError(f"Frames.seconds is {fault}: give a dense tensor with data")
    is_rising = bool(seconds.isfinite().all()) and bool((seconds.diff() >= 0).all())
    if not is_rising:
        raise MediaError("Frames.seconds must be finite and ascending: sort the frames by their times")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"Frames.fps is {fps!r}: give the frames a second among these frames, above 0")
    if frames.kind not in ("video", "image"):
        raise MediaError(f"Frames.kind is {frames.kind!r}: give 'video' or 'image'")


def from_array(array: Array | Tensor, config: VideoConfig, kind: str) -> Frames:
    """Return raw frames [T, H, W, 3] or [T, 3, H, W], or a raw image without the T, as Frames."""
    shape = "nested shape" if isinstance(array, Tensor) and array.is_nested else f"shape {list(array.shape)}"
    name = f"the {'tensor' if isinstance(array, Tensor) else 'array'} of {shape}"
    if kind == "image":
        return one_image(as_pixels(array, name, axes=array.ndim), name)
    pixels = as_pixels(array, name, axes=4)
    index, seconds, fps = untimed(len(pixels), config, name)
    return Frames(pixels if len(index) == len(pixels) else pixels[index], seconds, fps)


def as_pixels(array: Array | Tensor, name: str, *, axes: int) -> Tensor:
    """Return uint8 pixels [..., 3, H, W] (contiguous; a tensor stays on its device)."""
    if array.dtype not in (np.uint8, torch.uint8):
        raise MediaError(f"{name} has dtype {array.dtype}: pixels must be uint8, 0 to 255 (floats: (x * 255).round())")
    if isinstance(array, Tensor) and (fault := _not_plain(array)) is not None:
        raise MediaError(f"{name} is {fault} and holds no plain pixels: pass a dense tensor with data")
    if isinstance(array, np.ma.MaskedArray):
        raise MediaError(f"{name} is masked: fill it first (.filled(0))")
    shape = tuple(array.shape)
    if array.ndim != axes or axes not in (3, 4) or 3 not in (shape[-1], shape[-3]):
        wanted = "[T, H, W, 3] or [T, 3, H, W]" if axes == 4 else "[H, W, 3] or [3, H, W]"
        raise MediaError(f"{name} is not {wanted}: reorder its axes")
    if 0 in shape:
        raise MediaError(f"{name} is empty: pass at least one frame with pixels")
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return (array.movedim(-1, -3) if shape[-1] == 3 else array).contiguous()


def _not_plain(tensor: Tensor) -> str | None:
    """Return why a tensor's values cannot be read, None if they can."""
    if tensor.device.type == "meta":
        return "on the meta device"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def one_image(pixels: Tensor, name: str) -> Frames:
    """Return pixels [3, H, W] or [1, 3, H, W] as an image."""
    if pixels.ndim == 4 and len(pixels) != 1:
        raise MediaError(f"{name} has {len(pixels)} frames, an image has one: pass it as a video")
    return still(pixels.reshape(pixels.shape[-3:]), VideoConfig(), "image")


def untimed(num: int, config: VideoConfig, name: str) -> tuple[Tensor, Tensor, float]:
    """Return indices, seconds and rate of what the config asks of `num` frames that have no timestamps."""
    fps = config.fps or DEFAULT_FPS
    end = min(num / fps, config.end or math.inf)
    check_start(config, end, name)
    first = math.ceil(config.start * fps - 1e-6)
    part = np.arange(first, max(min(math.ceil(end * fps - 1e-6), num), first + 1)).clip(max=num - 1)
    thin = _thinned(len(part), config)
    index = torch.from_numpy(part[thin])
    return index, index.to(torch.float64) / fps, fps * len(thin) / len(part)


def _thinned(num: int, config: VideoConfig) -> npt.NDArray[np.int64]:
    """Return at most num_frames (or max_frames) evenly spread indices below `num`."""
    wanted = min(num, config.num_frames or config.max_frames)
    return np.arange(wanted, dtype=np.int64) * num // wanted


def check_start(config: VideoConfig, end: float, name: str) -> None:
    """Raise MediaError where the wanted part begins behind the end (both in seconds)."""
    if config.start >= end - 1e-6:
        raise MediaError(
            f"{name}: start={config.start:g} s is not before its end at {end:.6g} s: choose an earlier start"
        )


def check_size(name: str, count: int, width: int, height: int) -> None:
    """Raise MediaError where this many RGB frames take more than MAX_FRAME_BYTES."""
    if (size := count * width * height * 3) > MAX_FRAME_BYTES:
        raise MediaError(
            f"{name}: {count} frames of {width}x{height} take {size / 2**30:.1f} GiB, the limit is "
            f"{MAX_FRAME_BYTES / 2**30:.3g} GiB: read fewer (--num-frames, --fps, --max-frames, --start, --end)"
        )


def regular(start: float, end: float, fps: float, *, slack: float) -> Floats:
    """Return start + i / fps while below `end`; ends that are measured, not given, are blurred by `slack` seconds."""
    count = max(math.ceil((end - start - min(slack, 0.25 / fps)) * fps), 1)
    return start + np.arange(count) / fps
