"""When a video begins and ends, when its frames are shown, and where it can be entered; nothing is decoded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import av.error
import numpy as np
import numpy.typing as npt

from specvlm.core.config import DEFAULT_FPS, VideoConfig
from specvlm.media import ending
from specvlm.media.frames import Data, Floats
from specvlm.media.track import Track, Walk

_STATES_ITS_END = ("mov", "matroska", "flv", "ivf", "mxf")  # the length in the header is that of what was written
_LOOKED_THROUGH = 256 << 20  # bytes of a file without an index of its frames all of whose packets are looked at
_MOST_SECONDS = 1e9  # 31 years; what states more is damaged


class Clip(Track):
    """A video file, looked through."""

    def __init__(self, name: str, data: Data, config: VideoConfig) -> None:
        super().__init__(name, data, heap_rate=config.fps or DEFAULT_FPS)
        self.is_cut = False  # the file ends before it should
        self.is_stuck = False  # it has timestamps, but they stand still
        self._can_seek = self.is_timed
        self._has_gap = False  # the first frames of a recording joined to it are left out
        try:
            self._find_end()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_end(self) -> None:
        """Set when the video ends: by its track's header, else by its last packet; of a cut file, both."""
        stated, is_own = self._stated_end()
        walk = self._walk_to_end(stated)
        self._last_byte = walk.last_byte
        start, length = walk.last or (0, 0.0)
        exact = 1 / self.rate / self.tick  # a length of about one frame is one frame, rounded
        self.last_start = start * self.tick  # of the last frame that is there
        self.last_end = (start + (length if abs(length - self.gap) > 1 else exact)) * self.tick
        is_short = walk.is_spoilt or ending.is_cut(self.data, self.format)
        has_less = self.is_unreadable
        self.end = self.last_end
        if stated is not None and stated > self.last_start and not self.is_counted:
            lacking = stated - max(self.last_end, walk.decoding_end, walk.other_end)
            is_reliable = is_short if self.format == "avi" else any(name in self.format for name in _STATES_ITS_END)
            has_less |= is_reliable and lacking > 0.5 + 2 / self.rate
            is_rounded = abs(stated - self.last_end) <= 2 * max(self.tick, 1e-3)
            is_shorter = is_own and stated < self.last_end
            self.end = stated if has_less or is_rounded or is_shorter else self.last_end
        self.is_cut = has_less or is_short

    def _stated_end(self) -> tuple[float | None, bool]:
        """Return the end that the headers state, None where they are silent, and whether it is the video's own."""
        end, is_own = self._header_end()
        return (end if 0 < end < _MOST_SECONDS else None), is_own

    def _header_end(self) -> tuple[float, bool]:
        if self.format == "avi" and self.stream.frames:  # FFmpeg shortens the duration of a cut file
            return float(self.stream.frames * self.tick), True
        if self.stream.duration:
            return float(self.stream.duration * self.tick), True
        with suppress(KeyError, ValueError):  # Matroska's tag of a track, such as 00:01:02.500000000
            hours, minutes, seconds = self.stream.metadata["DURATION"].split(":")
            return float(hours) * 3600 + float(minutes) * 60 + float(seconds) - self.origin * self.tick, True
        return (self.scout.duration or 0) * 1e-6 - self.origin * self.tick, False

    def _walk_to_end(self, stated: float | None) -> Walk:
        """Look through the file's last part, or all of it where times may start again or the end is not known."""
        if self.is_timed and stated is not None and not self._may_have_breaks():
            with suppress(av.error.FFmpegError, OverflowError):
                # Packets stand in decoding order, and MPEG-TS is not entered at keyframes: start well before.
                self.scout.seek(self.ticks(stated) - 16 * self.gap, stream=self.stream)
                walk = self.walk()
                if walk.last is not None and not walk.breaks and not walk.does_not_rise:
                    return walk
        walk = self._walk_from_start()
        if walk.is_slow:
            self.is_broadcast = False
            walk = self._walk_from_start()
        if self.is_timed and walk.does_not_rise:
            self.is_stuck = True
            self.count_frames()
            walk = self._walk_from_start()
        self.has_breaks = walk.breaks > 0
        self._has_gap = self.has_breaks and self.num_left_out > 0
        self._can_seek = self.is_timed and not self.has_breaks
        return walk

    def _walk_from_start(self) -> Walk:
        self.restart()
        return self.walk()

    def _may_have_breaks(self) -> bool:
        """Whether timestamps may start again anywhere, so that all packets have to be looked at."""
        if not self.is_indexed and ending.size_of(self.data) <= _LOOKED_THROUGH:
            return True
        places = np.array([entry.pos for entry in self.stream.index_entries], np.int64)  # in the order of their times
        return self.is_broadcast or self.is_fragmented or bool((np.diff(places) < 0).any())

    @cached_property
    def _all_seconds(self) -> Floats:
        """The time of every frame, ascending, from a walk over all packets."""
        if self.is_timed:
            told = (packet.pts for packet in self.moved_packets() if packet.pts is not None)
            return (np.unique(np.fromiter(told, np.int64)) - self.origin) * self.tick
        lengths = np.fromiter(map(self.length_of, self.moved_packets()), np.float64)
        return (np.cumsum(lengths) - lengths) * self.tick

    def shown_within(self, start: float, end: float) -> Floats:
        """Return the times of the frames that are on screen between two times."""
        times = self._all_seconds
        first = max(int(np.searchsorted(times, start + self.slack, "right")) - 1, 0)
        return times[first : max(int(np.searchsorted(times, end - 1e-6)), first + 1)]

    def entry(self, limit: int, *, after: int) -> Entry | None:
        """Return where to go on for the frame at `limit`: a keyframe at or before it, later than `after`; None if none.

        Some formats seek to no keyframe, or too far: then ever earlier places are tried.
        """
        for back in (0, 1, 4, 16, 64):
            if not self._can_seek:
                return self._counted_entry(limit, after)
            target = limit - round(back / self.tick)
            if target <= after:
                return None
            try:
                self.scout.seek(target, stream=self.stream)
            except (av.error.FFmpegError, OverflowError):
                self._can_seek = False
                continue
            timed = (packet for packet in self.packets() if packet.pts is not None)
            reached = takewhile(lambda packet: packet.pts <= limit, timed)
            keys = [packet.pts for packet in reached if packet.is_keyframe]
            if keys:
                return Entry(keys[-1], target=target) if keys[-1] > after else None
        return None

    @cached_property
    def _keys(self) -> npt.NDArray[np.int64]:
        """Number and timestamp [2, K] of the packets that are keyframes, from a walk over all packets."""
        found, due, num = [], 0.0, 0
        for num, packet in enumerate(self.moved_packets(), 1):
            pts = packet.pts if self.is_timed else int(due)
            due += self.length_of(packet)
            if packet.is_keyframe and pts is not None:
                found.append((num - 1, pts))
        if not self.is_timed and len(found) < num:
            found = []  # the count of packets does not tell where a keyframe is shown if frames are reordered
        return np.array(found, np.int64).reshape(-1, 2).T

    def _counted_entry(self, limit: int, after: int) -> Entry | None:
        numbers, times = self._keys
        fitting = np.flatnonzero((times <= limit) & (times > after))
        return Entry(int(times[fitting[-1]]), number=int(numbers[fitting[-1]])) if len(fitting) else None

    def end_fault(self) -> str:
        """Return what is wrong with the file at its end, or ""."""
        if self.is_cut:
            return f"it stops before its end, at {self.last_end:.6g} s"
        if ending.has_another(self.data, self.format, self._last_byte):
            return f"a second file joined to it, behind {self.last_end:.6g} s, is not read"
        if self._has_gap:
            return "a second file is joined to it, whose first frames are not read"
        return ""


@dataclass(frozen=True)
class Entry:
    """A keyframe where decoding can go on."""

    pts: int
    target: int | None = None  # where to seek; None: packets are skipped
    number: int = 0  # of its packet, counted from the start of the file
