"""Timestamps that start again or jump within a file, made continuous."""

from __future__ import annotations

import math
from typing import Any

# Seconds. The first three are FFmpeg's own (ts_discontinuity_detect and -dts_delta_threshold, -dts_error_threshold).
_BROADCAST_FALL = 0.1
_BROADCAST_LEAP = 10.0
_LEAP = 30 * 3600.0
_FALL = 1.0  # elsewhere some demuxers give reordered presentation times as decoding times


class Timeline:
    """Moves the packets of one track, read from the start of a file, to one timeline without breaks.

    A decoding time that falls back begins a new recording, which follows the last. A leap forwards counts as one only
    in formats whose timestamps are the clock of a broadcast (MPEG-TS, MPEG-PS, Ogg): elsewhere a long gap is a picture
    that stands still.
    """

    def __init__(self, tick: float, gap: int, *, is_broadcast: bool, is_indexed: bool) -> None:
        self.breaks = 0  # how many there were
        self.leaps = 0  # how many of them were leaps forwards
        self._gap = gap
        self._fall = (_BROADCAST_FALL if is_broadcast else max(_FALL, 16 * gap * tick)) / tick
        self._leap = (_BROADCAST_LEAP if is_broadcast else _LEAP) / tick
        if is_indexed:  # all times were read at once and are sound, even if parts of the file are left out
            self._fall = self._leap = math.inf
        self._offset = 0
        self._last: int | None = None  # decoding time of the last packet, moved, in ticks
        self._due = 0  # decoding time expected of the next
        self._end: int | None = None  # when the last frame shown so far ends, moved

    def move(self, packet: Any) -> None:
        """Set the packet's timestamps on the continuous timeline."""
        if packet.dts is not None and not packet.is_discard:
            self._follow(packet)
        if self._offset:
            packet.dts = None if packet.dts is None else packet.dts + self._offset
            packet.pts = None if packet.pts is None else packet.pts + self._offset

    def _follow(self, packet: Any) -> None:
        length = packet.duration or self._gap
        dts = packet.dts + self._offset
        if self._last is not None and (dts + self._fall < self._last or abs(dts - self._due) > self._leap):
            self.breaks += 1
            self.leaps += dts > self._due
            is_shown = packet.pts is not None and self._end is not None
            self._offset = (self._end or 0) - packet.pts if is_shown else self._due - packet.dts
            dts = packet.dts + self._offset
        self._last = dts
        self._due = dts + length
        if packet.pts is not None:
            end = packet.pts + self._offset + length
            self._end = end if self._end is None else max(self._end, end)
