"""Which times of a video are wanted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from specvlm.config import DEFAULT_FPS, VideoConfig
from specvlm.media import frames
from specvlm.media.frames import Floats, check_size, check_start, regular

if TYPE_CHECKING:
    from specvlm.media.reader import Clip


def spread(pts: Floats, times: Floats) -> Floats:
    """Return one time of `pts` for each of `times`, close to it but no two the same; all if there are not more."""
    if len(pts) <= len(times):
        return pts
    place = np.arange(len(times))
    shown = np.searchsorted(pts, times, "right") - 1
    rising = np.maximum.accumulate(np.maximum(shown, 0) - place) + place
    return pts[np.minimum(rising, len(pts) - len(times) + place)]


def plan(clip: Clip, config: VideoConfig) -> tuple[Floats, float]:
    """Return the wanted times in seconds and their rate, before a frame is decoded."""
    end = min(clip.end, config.end or math.inf)
    check_start(config, end, clip.name)
    span, slack = end - config.start, 2e-3 if end == clip.end else 1e-6
    if (count := config.num_frames) is not None:
        if count * clip.size[0] * clip.size[1] * 3 > frames.MAX_FRAME_BYTES:
            count = min(count, len(clip.shown_within(config.start, end)))
        check_size(clip.name, count, *clip.size)
        return config.start + np.arange(count) * (span / count), count / span
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
