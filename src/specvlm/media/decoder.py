"""Decoding a clip forwards, only the groups of pictures that are wanted."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, cast

import av.error
from av.video.reformatter import VideoReformatter

from specvlm.media.clip import Clip, Entry
from specvlm.media.frames import Array


class Decoder:
    """Decodes a clip forwards, entering it at keyframes."""

    def __init__(self, clip: Clip) -> None:
        self.num_bad = 0  # packets that fail to decode
        self._clip = clip
        self._can_enter = True
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None  # of the first frame; later ones that differ are scaled to it
        self._open()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _open(self) -> None:
        self._container, self._stream = self._clip.decoder()
        self._from_start = self._numbered()

    def shown_at(self, times: Iterable[float]) -> Iterator[Any]:
        """Yield the frame on screen at each of the ascending times: the same object while it stays there.

        Stops early at the first time at which a damaged file has none. Before the first frame, that one counts.
        """
        frames = self._frames(None)
        shown = ahead = next(frames, None)
        for limit in map(self._clip.ticks, times):
            before = shown
            entry = self._entry(limit, shown, ahead)
            if entry is not None:
                frames = self._enter(entry, limit)
                shown = ahead = next(frames, None)
            while ahead is not None and ahead.pts <= limit:
                shown, ahead = ahead, next(frames, None)
            if before is not None and (shown is None or shown.pts < before.pts):
                shown = before  # damage can hide frames from a second reading
            if shown is None or (ahead is None and self._is_lost(shown.pts, limit)):
                return
            yield shown

    def _is_lost(self, last: int, limit: int) -> bool:
        """Whether decoding ended at `last`, well before a frame that the packets promise for `limit`."""
        return last + 2 * self._clip.gap < min(limit, self._clip.ticks(self._clip.last_start))

    def _entry(self, limit: int, shown: Any, ahead: Any) -> Entry | None:
        """Return where to enter if that is nearer to `limit` than `ahead`; a few frames are decoded, not looked for."""
        if ahead is None or not self._can_enter:
            return None
        step = ahead.pts - shown.pts  # the header may state a rate that is far too low
        gap = min(self._clip.gap, step) if step > 0 else self._clip.gap
        return self._clip.entry(limit, after=ahead.pts) if limit - ahead.pts > 8 * gap else None

    def _enter(self, entry: Entry, limit: int) -> Iterator[Any]:
        """Return the frames from a keyframe on; from the start of the file if it cannot be entered there."""
        if entry.target is None:
            self._stream.codec_context.flush_buffers()
        else:
            self._container.seek(entry.target, stream=self._stream)
        frames = self._frames(entry)
        first = next(frames, None)
        if first is not None and first.pts <= limit:
            return cast(Iterator[Any], chain((first,), frames))
        self._can_enter = False
        self._container.close()
        self._open()
        return self._frames(None)

    def _frames(self, entry: Entry | None) -> Iterator[Any]:
        """Yield decoded frames in the order shown, from an entry on (None: from the start of the file)."""
        clip = self._clip
        due: float = clip.origin if entry is None else entry.pts
        for packet in self._packets(entry):
            for frame in self._decoded(packet):
                if not clip.is_timed or frame.pts is None:
                    frame.pts = int(due)
                due = frame.pts + clip.length_of(frame)
                yield frame

    def _packets(self, entry: Entry | None) -> Iterator[Any]:
        """Yield packets, then None, which makes the decoder hand out what it holds back."""
        try:
            if entry is None or entry.target is None:
                yield from (packet for number, packet in self._from_start if entry is None or number >= entry.number)
            else:
                yield from self._sought(entry.pts)
        except (av.error.FFmpegError, IndexError):
            pass  # the scout has met it too, or the frames that are missing will tell
        yield None

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        """Yield number and packet from the start of the file on, timestamps made continuous."""
        timeline = self._clip.timeline() if self._clip.has_breaks else None
        number = 0
        for packet in self._container.demux(self._stream):
            if packet.size:
                if timeline is not None:
                    timeline.move(packet)
                yield number, packet
                number += not packet.is_discard

    def _sought(self, key: int) -> Iterator[Any]:
        """Yield the packets behind a seek, from the keyframe with timestamp `key` on."""
        is_there = False
        for packet in self._container.demux(self._stream):
            is_there = is_there or (packet.is_keyframe and packet.pts == key)
            if packet.size and is_there:
                yield packet

    def _decoded(self, packet: Any) -> list[Any]:
        try:
            return cast(list[Any], self._stream.decode(packet))
        except av.error.EOFError:
            return []
        except (av.error.FFmpegError, OverflowError, MemoryError):
            self.num_bad += 1
            return []

    def rgb(self, frame: Any) -> Array:
        """Return the frame upright, [3, H, W] uint8: a view of the converted picture."""
        self._size = self._size or (frame.width, frame.height)
        width, height = self._size
        picture = self._reformatter.reformat(frame, width, height, "rgb24", src_color_range=int(frame.color_range))
        return _upright(picture.to_ndarray(), frame).transpose(2, 0, 1)


def _upright(array: Array, frame: Any) -> Array:
    """Return [H, W, 3] turned and mirrored in right angles, as the frame's display matrix asks."""
    try:
        matrix = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"]))
    except (KeyError, struct.error):
        return array
    a, b, _, c, d = matrix[:5]  # right' = a right + c down, down' = b right + d down
    if abs(b) + abs(c) > abs(a) + abs(d):
        array, a, d = array.transpose(1, 0, 2), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
