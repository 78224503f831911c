"""The video reader, by PyAV: looks a file through without decoding, then decodes the groups of pictures it needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av.error
import numpy as np
import torch
from torch import Tensor

from specvlm.core.config import VideoConfig
from specvlm.core.errors import MediaError
from specvlm.media.clip import Clip
from specvlm.media.content import line_of
from specvlm.media.decoder import Decoder
from specvlm.media.frames import Array, Data, Floats, Frames, MediaWarning
from specvlm.media.times import Plan, plan, spread

_LONG_HOLD = 60.0  # seconds; one frame that is on screen for longer, and nearly always, is told


def read_video(name: str, data: Data, config: VideoConfig) -> Frames:
    """Return the wanted frames of a video file."""
    with _damage_told(name), Clip(name, data, config) as clip:
        wanted = plan(clip, config)
        found = read(clip, wanted.times)
        if config.num_frames and len(set(found.seconds)) < len(wanted.times) and not found.num_missing:
            del found  # two readings would take the memory twice
            wanted = wanted.at(spread(clip.shown_within(config.start, wanted.end), wanted.times))
            found = read(clip, wanted.times)
        if not found.seconds:
            raise MediaError(f"{name}: no frame of the wanted part can be decoded: the file is damaged, fetch it again")
        _warn(clip, wanted, found)
    return Frames(found.pixels, torch.tensor(found.seconds, dtype=torch.float64), wanted.rate)


@dataclass(frozen=True)
class Reading:
    """Frames at wanted times, and what is wrong with them."""

    pixels: Tensor  # [T, 3, H, W] uint8
    seconds: list[float]  # the T frames' own times
    num_missing: int  # wanted frames that are not there
    num_bad: int  # packets that fail to decode, and shown frames that are spoilt


def read(clip: Clip, times: Floats) -> Reading:
    """Decode the frames on screen at the ascending times; fewer where the file is damaged."""
    there = times[times < clip.last_end] if clip.is_cut else times
    pixels: Array = np.empty((0, 3, 1, 1), np.uint8)
    seconds: list[float] = []
    before = None
    num_spoilt = 0
    with Decoder(clip) as decoder:
        for row, frame in enumerate(decoder.shown_at(there)):
            if frame is before:
                pixels[row] = pixels[row - 1]
            else:
                array = decoder.rgb(frame)
                if before is None:
                    pixels = np.empty((len(times), *array.shape), np.uint8)
                pixels[row] = array  # NumPy: torch's copy of permuted bytes takes several times as long
                num_spoilt += frame.is_corrupt
            seconds.append(clip.seconds(frame.pts))
            before = frame
        num_bad = decoder.num_bad + num_spoilt
    pixels.resize((len(seconds), *pixels.shape[1:]), refcheck=False)  # in place
    return Reading(torch.from_numpy(pixels), seconds, len(times) - len(seconds), num_bad)


@contextmanager
def _damage_told(name: str) -> Iterator[None]:
    """Raise MediaError in place of what PyAV and arithmetic raise on values that no sound file holds."""
    try:
        yield
    except (av.error.FFmpegError, ArithmeticError, ValueError, LookupError) as error:
        raise MediaError(
            f"{name} is damaged and cannot be read ({line_of(error)}): fetch or export it again"
        ) from error
    except MemoryError as error:
        raise MediaError(
            f"{name}: its frames do not fit in memory: read fewer (--num-frames, --fps, --max-frames, --start, --end)"
        ) from error


def _warn(clip: Clip, wanted: Plan, found: Reading) -> None:
    """Tell once what is missing, spoilt or not as the file says, if anything is."""
    faults = []
    if found.num_missing:
        missing = f"{found.num_missing} of the {len(wanted.times)} wanted frames are missing"
        faults.append(f"{missing} (it ends at {clip.last_end:.6g} s)")
    elif wanted.end > clip.last_start and (fault := clip.end_fault()):
        faults.append(fault)
    if found.num_bad:
        faults.append(f"{found.num_bad} frames are spoilt")
    remedy = "is damaged or cut short: {}; fetch or export it again"
    if not faults:
        remedy = "has timestamps that cannot be right: {}; export it again"
        faults = _odd_times(clip, found.seconds)
    if faults:
        warnings.warn(f"{clip.name} {remedy.format(', '.join(faults))}", MediaWarning, stacklevel=4)


def _odd_times(clip: Clip, seconds: list[float]) -> list[str]:
    """Return what is odd about the times of the frames."""
    if clip.is_stuck:
        return [f"they do not rise, so its frames are taken to follow at {clip.rate:.6g} a second"]
    shown, counts = np.unique(seconds, return_counts=True)
    most = int(counts.argmax())
    if len(seconds) < 10 or counts[most] < 0.9 * len(seconds):
        return []
    times = clip.shown_within(0, clip.end)
    place = int(np.searchsorted(times, shown[most] + clip.slack, "right"))
    hold = (times[place] if place < len(times) else clip.end) - shown[most]
    if len(times) < 10 or hold < _LONG_HOLD:
        return []
    return [
        f"they leap by {hold:.6g} s at {shown[most]:.6g} s, so {counts[most]} of {len(seconds)} frames are the same"
    ]
