"""Which times of a video are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from specvlm.core.config import DEFAULT_FPS, VideoConfig
from specvlm.media.frames import Floats, check_size, check_start, regular

if TYPE_CHECKING:
    from specvlm.media.clip import Clip

_FEW_FRAMES = 256  # more are asked for than this: how many the file has is counted first, which decodes none


def spread(pts: Floats, times: Floats) -> Floats:
    """Return one time of `pts` for each of `times`, close to it but no two the same; all if there are not more."""
    if len(pts) <= len(times):
        return pts
    place = np.arange(len(times))
    shown = np.searchsorted(pts, times, "right") - 1
    rising = np.maximum.accumulate(np.maximum(shown, 0) - place) + place
    return pts[np.minimum(rising, len(pts) - len(times) + place)]


@dataclass(frozen=True)
class Plan:
    """Which times are wanted."""

    times: Floats  # seconds, ascending
    rate: float  # frames a second
    start: float  # of the wanted part
    end: float

    def at(self, times: Floats) -> Plan:
        """Return a plan of other times in the same part."""
        return replace(self, times=times, rate=len(times) / (self.end - self.start))


def plan(clip: Clip, config: VideoConfig) -> Plan:
    """Return the wanted times, before a frame is decoded."""
    end = min(clip.end, config.end or math.inf)
    check_start(config, end, clip.name)
    times, rate = _counted(clip, config, end) if config.num_frames else _at_rate(clip, config, end)
    return Plan(times, rate, config.start, end)


def _counted(clip: Clip, config: VideoConfig, end: float) -> tuple[Floats, float]:
    """Return num_frames times and their rate; the frames' own times if there are not more."""
    count, span = config.num_frames or 1, end - config.start
    if count > min(_FEW_FRAMES, span * clip.rate):  # headers may state a rate that is not so: count the frames
        pts = clip.shown_within(config.start, end)
        if len(pts) <= count:
            check_size(clip.name, len(pts), *clip.size)
            return pts, len(pts) / span
    check_size(clip.name, count, *clip.size)
    return config.start + np.arange(count) * (span / count), count / span


def _at_rate(clip: Clip, config: VideoConfig, end: float) -> tuple[Floats, float]:
    """Return the times at config.fps, at a lower rate where that is above the file's own or gives too many."""
    span, slack = end - config.start, 2e-3 if end == clip.end else 1e-6
    rate = config.fps or DEFAULT_FPS
    if config.min_frames is not None:
        rate = max(rate, config.min_frames / span)
    if (span - slack) * rate > config.max_frames:
        rate = config.max_frames / span
    if rate > clip.rate * (1 + 1e-6):  # the header says that the file has fewer: count them
        pts = clip.shown_within(config.start, end)
        gaps = np.diff(pts)
        if (own := 1 / float(gaps.mean()) if len(gaps) else 1 / span) < rate:
            rate = own
            if len(pts) <= config.max_frames and np.all(abs(gaps * own - 1) < 0.5):
                check_size(clip.name, len(pts), *clip.size)
                return pts, rate
    check_size(clip.name, math.ceil(span * rate), *clip.size)
    return regular(config.start, end, rate, slack=slack)[: config.max_frames], rate
