"""Videos that exceed the model's context: how many frames, of what size, would fit; found from shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from specvlm.core.config import VideoConfig
from specvlm.core.errors import Advice, CapacityError, ConfigError, SpecVLMWarning
from specvlm.families import Family, Limits, Message, Size
from specvlm.media import Frames

_FEW = 4  # frames of a video below which they are rather made smaller


class FitWarning(Advice, SpecVLMWarning):
    """Videos were thinned to fit the context."""


@dataclass(frozen=True)
class Prompted:
    """What a prompt is made of."""

    messages: Sequence[Message]
    media: Sequence[Frames]
    limits: Sequence[Limits]

    def hollow(self) -> Prompted:
        """Return it without its pixels, of which only the shapes are left."""
        return replace(self, media=[replace(frames, pixels=frames.pixels.to("meta")) for frames in self.media])

    def thinned(self, num_frames: int | None = None, max_pixels: int | None = None) -> Prompted:
        """Return it with at most so many frames of every video, evenly spread, and so many pixels of every frame."""
        media = self.media if num_frames is None else [_thinned(frames, num_frames) for frames in self.media]
        limits = self.limits if max_pixels is None else [_bounded(limits, max_pixels) for limits in self.limits]
        return Prompted(self.messages, media, limits)

    def size(self, family: Family) -> Size:
        """Return how large it is, by the shapes alone."""
        return family.measure(self.messages, self.media, self.limits)


def fitted(family: Family, prompted: Prompted, num_new: int, context: int, config: VideoConfig) -> Prompted:
    """Return a prompt that leaves room for `num_new` tokens in the context, its videos thinned where they must be.

    Raises:
        CapacityError: it does not fit and may not, or cannot, be thinned.

    Warns:
        FitWarning: it was thinned; the warning has the numbers.
    """
    whole = prompted.size(family)
    if whole.num_tokens + num_new <= context:
        return prompted
    has_video = any(frames.kind == "video" for frames in prompted.media)
    settings = _search(family, prompted.hollow(), context - num_new, whole) if prompted.media else {}
    problem = f"{whole.num_tokens} prompt tokens and {num_new} new ones exceed the context of {context} tokens"
    if not settings or not has_video or config.fit == "error":
        raise _refusal(problem, settings, context - whole.num_tokens, has_video)
    found = prompted.thinned(**settings)
    warnings.warn(_told(problem, prompted, whole, found, found.size(family), settings), stacklevel=2)
    return found


def _search(family: Family, prompted: Prompted, room: int, whole: Size) -> dict[str, int]:
    """Return settings that fit into `room` tokens, as few as there need be: fewer frames, or else smaller ones, too."""

    def fits(settings: dict[str, int]) -> bool:
        try:
            return prompted.thinned(**settings).size(family).num_tokens <= room
        except ConfigError:  # a bound that this model cannot keep
            return False

    longest = max((len(frames.pixels) for frames in prompted.media if frames.kind == "video"), default=0)
    count = _largest(1, longest, lambda number: fits({"num_frames": number}))
    few = {"num_frames": min(_FEW, longest)} if longest else {}
    if count and count >= few["num_frames"]:
        return {"num_frames": count}
    pixels = _largest(_LEAST_PIXELS, max(whole.frame_pixels), lambda most: fits(few | {"max_pixels": most}))
    if pixels:
        size = prompted.thinned(**few, max_pixels=pixels).size(family)
        rounder = few | {"max_pixels": max(size.frame_pixels)}  # what the frames have then, where that says the same
        return (
            rounder
            if fits(rounder) and prompted.thinned(**rounder).size(family) == size
            else few | {"max_pixels": pixels}
        )
    return {"num_frames": count} if count else {}


_LEAST_PIXELS = 784  # that max_pixels may be


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number from low to high for which something holds that holds below as well; 0 if for none."""
    if high < low or not holds(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _thinned(frames: Frames, most: int) -> Frames:
    count = len(frames.pixels)
    if frames.kind != "video" or count <= most:
        return frames
    index = torch.arange(most) * count // most
    seconds = frames.seconds[index.to(frames.seconds.device)]
    return replace(frames, pixels=frames.pixels[index.to(frames.pixels.device)], seconds=seconds,
                   fps=frames.fps * most / count)  # fmt: skip


def _bounded(limits: Limits, max_pixels: int) -> Limits:
    most = min(max_pixels, limits.max_pixels or max_pixels)
    least = None if limits.min_pixels is None else min(limits.min_pixels, most)
    return Limits(most, limits.total_pixels, least)


def _refusal(problem: str, settings: dict[str, int], room: int, has_video: bool) -> CapacityError:
    """Return the error; what it advises fits."""
    remedies, advised = [], dict(settings)
    if settings:
        words = "fewer frames" if "num_frames" in settings else "smaller images"
        words += " and smaller ones" if len(settings) > 1 else ""
        remedies.append(f"read {words} ({' and '.join(f'{{{name}}}' for name in settings)} would fit)")
    if room >= 1:
        advised["max_new_tokens"] = room
        remedies.append("ask for fewer new tokens ({max_new_tokens} would fit)")
    elif not settings:
        remedies.append("shorten the text" if has_video else f"shorten the text by {1 - room} tokens or more")
    if has_video and not settings:
        problem += " (fewer frames alone would not do)"
    return CapacityError(f"{problem}: {', or '.join(remedies)}", **advised)


def _told(
    problem: str, before: Prompted, whole: Size, after: Prompted, small: Size, settings: dict[str, int]
) -> FitWarning:
    """Return the warning: frames and pixels of every video, before and after."""
    changes = []
    for place, frames in enumerate(before.media):
        if frames.kind == "video":
            old = f"{len(frames.pixels)} frames of {whole.frame_pixels[place]} pixels"
            changes.append(f"{len(after.media[place].pixels)} of {small.frame_pixels[place]} in place of {old}")
    read = f"the model sees {'; '.join(changes)}, {small.num_tokens} prompt tokens"
    asked = " ".join(f"{{{name}}}" for name in settings)
    return FitWarning(f"{problem}: {read} (ask for {asked}, or refuse by {{fit}})", **settings, fit="error")
