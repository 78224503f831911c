"""The video track of a file: its clock, and its packets without decoding them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import av.error

from specvlm.core.errors import MediaError
from specvlm.media.container import MAX_PICTURE_PIXELS, film_index, open_container, open_decoder
from specvlm.media.content import head_of
from specvlm.media.frames import Data
from specvlm.media.timeline import Timeline

_HEAP = "mjpeg"  # pictures one after another, with no times and no rate
_MOST_RATE = 1e5  # frames a second; what states more is damaged
_TS_DISCONT = 0x200  # FFmpeg's AVFMT_TS_DISCONT: timestamps are a clock, which may be set anew


class Track:
    """The stream of a file that is shown. Times are seconds after its first frame, ticks are its time base.

    The container is one for looking alone, so that searching never disturbs a decoder's place.
    """

    def __init__(self, name: str, data: Data, heap_rate: float) -> None:
        self.name, self.data = name, data
        self.is_unreadable = False  # a read error ended the packets
        self.has_breaks = False  # its times start again or leap, and are made continuous from the start of the file
        self.scout = open_container(name, data)
        try:
            self.index = film_index(self.scout, name)
            self.restart()
            self._read_headers(heap_rate)
        except BaseException:
            self.scout.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self.scout.close()

    def restart(self) -> None:
        """Put the scout at the start of the file (not every format can seek there)."""
        self.num_left_out = 0  # frames that FFmpeg drops where the fragments of another recording begin
        self.scout.close()
        self.scout = open_container(self.name, self.data)
        self.stream = self.scout.streams[self.index]

    def decoder(self) -> tuple[Any, Any]:
        """Return a new container and its stream, to be decoded."""
        return open_decoder(self.name, self.data, self.index)

    def _read_headers(self, heap_rate: float) -> None:
        stream = self.stream
        self.format = str(self.scout.format.name)
        self.is_broadcast = bool(int(self.scout.format.flags) & _TS_DISCONT)  # a long gap is a clock set anew
        self.is_indexed = self.format.startswith("mov") and stream.frames > 0  # its header tells every frame's time
        self.is_fragmented = self.format.startswith("mov") and not self.is_indexed
        self.is_counted = self.format == _HEAP  # there are no usable times: frames are `gap` apart
        self.rate = heap_rate if self.is_counted else _rate_of(stream)  # frames a second, by the header
        self.tick = 1 / self.rate if self.is_counted else float(stream.time_base or 0) or 1e-6  # seconds
        self.gap = max(round(1 / self.rate / self.tick), 1)  # ticks from frame to frame, by the header
        # Seconds that a timestamp may be late because it was rounded to a tick; where ticks count frames, none is.
        self.slack = (min(self.tick / 2, 5e-3) if self.gap > 4 else 0) + 1e-6
        self.size = _checked_size(stream.codec_context, self.name, self.data)
        first = next(self.packets(), None)
        if first is None:
            raise MediaError(f"{self.name}: its video has no frames: the recording or copy that made it failed")
        # Raw streams have no timestamps; AVI's do not tell in which order frames are shown.
        is_reordered_avi = self.format == "avi" and stream.codec_context.has_b_frames
        self.is_timed = first.pts is not None and not is_reordered_avi and not self.is_counted
        start = stream.start_time if stream.start_time is not None else first.pts
        self.origin = int(start or 0) if self.is_timed else 0  # the first frame's timestamp, in ticks
        self._first_decoding = first.dts if first.dts is not None else self.origin

    def count_frames(self) -> None:
        """Take the frames to be one header's gap apart, whatever their timestamps say."""
        self.is_counted, self.is_timed, self.origin = True, False, 0

    def ticks(self, time: float) -> int:
        """Return the last timestamp that counts as at or before a time."""
        return self.origin + int((time + self.slack) // self.tick)

    def seconds(self, pts: int) -> float:
        """Return the time of a timestamp."""
        return (pts - self.origin) * self.tick

    def length_of(self, item: Any) -> float:
        """Return how long a packet or frame is shown, in ticks."""
        return self.gap if self.is_counted else float(item.duration or self.gap)

    def timeline(self) -> Timeline:
        """Return what makes the timestamps of packets that are read in order continuous; an index needs nothing."""
        return Timeline(self.tick, self.gap, is_broadcast=self.is_broadcast, is_indexed=self.is_indexed)

    def packets(self, *, every_stream: bool = False) -> Iterator[Any]:
        """Yield the packets from where the scout stands; a read error ends them."""
        try:
            for packet in self.scout.demux() if every_stream else self.scout.demux(self.stream):
                if packet.size and not (packet.is_discard and packet.stream_index == self.index):
                    yield packet
                elif packet.size and self.is_fragmented:
                    self.num_left_out += 1
        except (av.error.EOFError, IndexError):
            pass  # PyAV raises the second at the end of a file whose tracks do not all begin at its start
        except av.error.FFmpegError:
            self.is_unreadable = True

    def moved_packets(self) -> Iterator[Any]:
        """Yield all packets of the track from the start of the file, their timestamps made continuous."""
        self.restart()
        timeline = self.timeline()
        for packet in self.packets():
            if self.has_breaks:
                timeline.move(packet)
            yield packet

    def walk(self) -> Walk:
        """Read all packets from where the scout stands."""
        timeline, found, untimed = self.timeline(), Walk(), 0
        for packet in self.packets(every_stream=True):
            found.is_spoilt = packet.is_corrupt
            if packet.stream_index == self.index:
                timeline.move(packet)
                length = self.length_of(packet)
                is_told = self.is_timed and packet.pts is not None
                found.add(packet, packet.pts - self.origin if is_told else untimed, length)
                untimed += int(length)
                if packet.dts is not None:
                    found.decoding_end = (packet.dts - self._first_decoding + length) * self.tick
            elif packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * float(packet.time_base or 0)
                found.other_end = end - self.origin * self.tick
        found.breaks = timeline.breaks
        found.leaps = timeline.leaps
        return found


@dataclass
class Walk:
    """What a walk over the packets of a track tells, up to the end of the file."""

    last: tuple[int, float] | None = None  # the last frame's start, in ticks from the origin, and its length in ticks
    num: int = 0
    num_still: int = 0  # packets with the timestamp of the one before
    num_falling: int = 0  # packets with an earlier one; of reordered frames, up to half
    last_byte: int = 0  # where the last complete packet ends in the file
    is_spoilt: bool = False  # the last packet, of any track, is not complete
    decoding_end: float = 0.0  # seconds; the end by decoding times, as mp4 counts
    other_end: float = 0.0  # seconds; of the other streams
    breaks: int = 0  # of the timeline
    leaps: int = 0
    _before: int | None = None

    def add(self, packet: Any, start: int, length: float) -> None:
        """Take in a packet of the track."""
        if self.last is None or start > self.last[0]:
            self.last = start, length
        self.num += 1
        self.num_still += packet.pts is not None and packet.pts == self._before
        self.num_falling += packet.pts is not None and self._before is not None and packet.pts < self._before
        self._before = packet.pts
        if not packet.is_corrupt:
            self.last_byte = max(self.last_byte, (packet.pos or 0) + packet.size)

    @property
    def does_not_rise(self) -> bool:
        """Whether most timestamps are that of the frame before, or earlier."""
        return 2 * self.num_still > self.num or 4 * self.num_falling > 3 * self.num

    @property
    def is_slow(self) -> bool:
        """Whether long gaps are so many that they are no breaks: a film of slides."""
        return 5 * self.leaps > self.num


def _rate_of(stream: Any) -> float:
    """Return frames a second by the header; 25 where it states nothing that can be."""
    for stated in (stream.average_rate, stream.guessed_rate):
        if stated and 0 < stated <= _MOST_RATE:
            return float(stated)
    return 25.0


def _checked_size(context: Any, name: str, data: Data) -> tuple[int, int]:
    """Return width and height, or raise if they are none or too large."""
    width, height = (context.width, context.height) if context.width else _stated_size(data)
    limit = f"the limit for one frame is {MAX_PICTURE_PIXELS * 3 / 2**30:.3f} GiB ({MAX_PICTURE_PIXELS} pixels)"
    if width * height > MAX_PICTURE_PIXELS:
        size = width * height * 3 / 2**30
        raise MediaError(
            f"{name}: 1 frame of {width}x{height} takes {size:.1f} GiB, {limit}: scale the video down first"
        )
    if not context.width or not context.height:
        raise MediaError(
            f"{name}: its video has no picture size, or one that cannot be ({limit}): scale it down, or if it is "
            "damaged, fetch it again"
        )
    return width, height


def _stated_size(data: Data) -> tuple[int, int]:
    """Return the canvas that a GIF or PNG states, whose decoder refuses to tell it where it is too large."""
    head = head_of(data, 24).ljust(24, b"\0")
    if head.startswith(b"GIF8"):
        return cast(tuple[int, int], struct.unpack("<HH", head[6:10]))
    if head.startswith(b"\x89PNG"):
        return cast(tuple[int, int], struct.unpack(">II", head[16:24]))
    return 0, 0
