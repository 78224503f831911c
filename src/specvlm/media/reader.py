"""The video reader, by PyAV: looks a file through without decoding, then decodes the groups of pictures it needs."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import Any, cast

import av
import av.error
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from specvlm.config import VideoConfig
from specvlm.errors import MediaError
from specvlm.media.content import described, line_of
from specvlm.media.frames import Array, Data, Floats, Frames, MediaWarning
from specvlm.media.times import plan, spread

_FORMATS = (  # a playlist format (hls, dash, concat) would let a file name other files and hosts, so none is here
    "mov,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,live_flv,asf,ogg,gif,apng,mjpeg,"
    "yuv4mpegpipe,nut,mxf,rm,wtv,dv,3gp,mp3,wav,flac,aac,amr,aiff,w64"
)
_ATTACHED_PICTURE = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC


def read_video(name: str, data: Data, config: VideoConfig) -> Frames:
    """Return the wanted frames of a video file."""
    with Clip(name, data) as clip:
        times, rate = plan(clip, config)
        pixels, seconds = clip.read(times)
        if config.num_frames and len(set(seconds)) < len(times) and not clip.num_missing:
            end = min(clip.end, config.end or math.inf)
            times = spread(clip.shown_within(config.start, end), times)
            pixels, seconds = clip.read(times)
            rate = len(times) / (end - config.start)
        if not seconds:
            raise MediaError(f"{name}: no frame of the wanted part can be decoded: the file is damaged, fetch it again")
        clip.warn(len(times))
    return Frames(pixels, torch.tensor(seconds, dtype=torch.float64), rate)


class Clip:
    """A video file, looked through without decoding. Times are seconds after its first frame, ticks are its time base.

    The scout is a container of its own, so that looking for a keyframe never disturbs a decoder's place.
    """

    def __init__(self, name: str, data: Data) -> None:
        self.name, self._data = name, data
        self.is_cut = False  # the file ends before it should
        self.num_bad = self.num_missing = 0  # packets or frames that fail to decode; wanted frames that are not there
        self._scout = self.open()
        try:
            self._look()
        except BaseException:
            self._scout.close()
            raise

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        self._scout.close()

    def open(self) -> Any:
        """Return a new container of the file, which reads no other file or host."""
        source = io.BytesIO(self._data) if isinstance(self._data, bytes) else f"file:{self._data}"
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        try:
            return av.open(source, container_options=options, metadata_errors="replace")
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self.name} cannot be read as a video{described(self._data, 'video')} ({line_of(error)})"
            ) from error

    def video_stream(self, container: Any) -> Any:
        """Return the first video stream that is not the cover picture of a piece of music."""
        for stream in container.streams.video:
            disposition = getattr(stream, "disposition", None)  # an enum, of another kind in each PyAV; 14.0 has none
            if not getattr(disposition, "value", 0) & _ATTACHED_PICTURE:
                return stream
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        others = f" (only {kinds})" if kinds else ""
        raise MediaError(f"{self.name} has no video{others}: pass a file with a video track")

    def _look(self) -> None:
        """Read what the headers and the first packet say, then find the end."""
        self._stream = stream = self.video_stream(self._scout)
        if stream.codec_context is None:
            raise MediaError(f"{self.name}: its video is in a format that is not known here: convert it to mp4 (h264)")
        self.tick = float(stream.time_base or 0) or 1e-6  # seconds
        self.rate = float(stream.average_rate or stream.guessed_rate or 25)  # frames a second, by the header
        self.gap = max(round(1 / self.rate / self.tick), 1)  # ticks from frame to frame, by the header
        # Seconds that a timestamp may be late because it was rounded to a tick; where ticks count frames, none is.
        self.slack = (min(self.tick / 2, 5e-3) if self.gap > 4 else 0) + 1e-6
        self.size = (stream.codec_context.width, stream.codec_context.height)
        if 0 in self.size:
            raise MediaError(f"{self.name}: its video has no picture size: the file is damaged, fetch it again")
        first = next(self._packets(), None)
        if first is None:
            raise MediaError(f"{self.name}: its video has no frames: the recording or copy that made it failed")
        # Raw streams have no timestamps; AVI's do not tell in which order frames are shown.
        is_reordered_avi = self._scout.format.name == "avi" and stream.codec_context.has_b_frames
        self.is_timed = first.pts is not None and not is_reordered_avi
        start = stream.start_time if stream.start_time is not None else first.pts
        self.origin = int(start or 0) if self.is_timed else 0  # the first frame's timestamp, in ticks
        self._first_decoding = first.dts if first.dts is not None else self.origin
        self._find_end()

    def _find_end(self) -> None:
        """Set when the video ends: by its track's header, else by its last packet; of a cut file, both."""
        stated, is_own = self._stated_end()
        self.last_start, self.last_end = self._measured_end(stated)  # of the last frame that is there
        if stated is None or stated <= self.last_start:
            self.end = self.last_end
            return
        lacking = stated - max(self.last_end, self._last_decoding, self._other_end)
        is_reliable = any(name in self._scout.format.name for name in ("mov", "matroska", "avi"))
        self.is_cut |= is_reliable and lacking > 0.5 + 2 / self.rate
        is_rounded = abs(stated - self.last_end) <= 2 * max(self.tick, 1e-3)
        is_shorter = is_own and stated < self.last_end
        self.end = stated if self.is_cut or is_rounded or is_shorter else self.last_end

    def _stated_end(self) -> tuple[float | None, bool]:
        """Return the end that the headers state, None where they are silent, and whether it is the video's own."""
        if self._stream.duration:
            return float(self._stream.duration * self.tick), True
        with suppress(KeyError, ValueError):  # Matroska's tag of a track, such as 00:01:02.500000000
            hours, minutes, seconds = self._stream.metadata["DURATION"].split(":")
            return float(hours) * 3600 + float(minutes) * 60 + float(seconds) - self.origin * self.tick, True
        if self._scout.duration:
            return float(self._scout.duration * 1e-6 - self.origin * self.tick), False
        return None, False

    def _measured_end(self, stated: float | None) -> tuple[float, float]:
        """Return when the last frame that is there starts and ends, from the packets of the file's last part."""
        if self.is_timed and stated is not None:
            with suppress(av.error.FFmpegError):
                # Packets stand in decoding order, and MPEG-TS is not entered at keyframes: start well before.
                self._scout.seek(self.ticks(stated) - 16 * self.gap, stream=self._stream)
                if (last := self._walk_to_end()) is not None:
                    return last
        self._restart()
        return self._walk_to_end() or (0.0, 0.0)

    def _walk_to_end(self) -> tuple[float, float] | None:
        """Return start and end of the last frame from here on, None if there is none; note when all else ends."""
        last: tuple[int, float] | None = None  # ticks from the origin, and length in ticks
        untimed = 0
        self._other_end = self._last_decoding = 0.0  # of other streams; of this one's decoding times, as mp4 counts
        for packet in self._packets(every_stream=True):
            length: float = packet.duration or self.gap
            if packet.stream_index != self._stream.index:
                if packet.pts is not None:
                    self._other_end = float((packet.pts + length) * packet.time_base) - self.origin * self.tick
                continue
            start = packet.pts - self.origin if self.is_timed and packet.pts is not None else untimed
            untimed += int(length)
            if packet.dts is not None:
                self._last_decoding = (packet.dts - self._first_decoding + length) * self.tick
            if last is None or start > last[0]:
                last = start, length
        if last is None:
            return None
        start, length = last
        exact = 1 / self.rate / self.tick  # a length of about one frame is one frame, rounded
        return start * self.tick, (start + (length if abs(length - self.gap) > 1 else exact)) * self.tick

    def _packets(self, *, every_stream: bool = False) -> Iterator[Any]:
        """Yield the scout's packets from where it stands; a read error ends them."""
        try:
            for packet in self._scout.demux() if every_stream else self._scout.demux(self._stream):
                if packet.size and not packet.is_discard:
                    yield packet
        except (av.error.EOFError, IndexError):
            pass  # PyAV raises the second at the end of a file whose tracks do not all begin at its start
        except av.error.FFmpegError:
            self.is_cut = True

    def _restart(self) -> None:
        """Put the scout at the start of the file (not every format can seek there)."""
        self._scout.close()
        self._scout = self.open()
        self._stream = self.video_stream(self._scout)

    @cached_property
    def _all_seconds(self) -> Floats:
        """The time of every frame, ascending, from a walk over all packets."""
        self._restart()
        if self.is_timed:
            return np.array(sorted({self.seconds(p.pts) for p in self._packets() if p.pts is not None}))
        lengths = [packet.duration or self.gap for packet in self._packets()]
        return np.cumsum([0, *lengths[:-1]]) * self.tick

    def shown_within(self, start: float, end: float) -> Floats:
        """Return the times of the frames that are on screen between two times."""
        times = self._all_seconds
        first = max(int(np.searchsorted(times, start + self.slack, "right")) - 1, 0)
        return times[first : max(int(np.searchsorted(times, end - 1e-6)), first + 1)]

    def ticks(self, time: float) -> int:
        """Return the last timestamp that counts as at or before a time."""
        return self.origin + math.floor((time + self.slack) / self.tick)

    def seconds(self, pts: int) -> float:
        """Return the time of a timestamp."""
        return (pts - self.origin) * self.tick

    def keyframe(self, limit: int, *, after: int) -> tuple[int, int] | None:
        """Return where to seek, and the timestamp of the keyframe there: at or before `limit`, later than `after`.

        Return None if there is none. Some formats seek to no keyframe, or too far: then ever earlier places are tried.
        """
        for back in (0, 1, 4, 16, 64):
            target = limit - round(back / self.tick)
            if not self.is_timed or target <= after:
                return None
            try:
                self._scout.seek(target, stream=self._stream)
            except av.error.FFmpegError:
                return None
            timed = (packet for packet in self._packets() if packet.pts is not None)
            found = next((packet for packet in timed if packet.is_keyframe or packet.pts > limit), None)
            if found is not None and found.pts <= limit:
                return (target, found.pts) if found.pts > after else None
        return None

    def read(self, times: Floats) -> tuple[Tensor, list[float]]:
        """Decode the frames on screen at the ascending times.

        Returns:
            pixels [T, 3, H, W] and the T frames' own times; fewer than asked where the file is damaged.
        """
        there = times[times < self.last_end] if self.is_cut else times
        pixels, seconds, before = np.empty((0, 3, 1, 1), np.uint8), [], None
        self.num_bad = 0
        with Decoder(self) as decoder:
            for row, frame in enumerate(decoder.shown_at(there)):
                array = decoder.rgb(frame) if frame is not before else pixels[row - 1]
                if before is None:
                    pixels = np.empty((len(times), *array.shape), np.uint8)
                pixels[row] = array  # NumPy: torch's copy of permuted bytes takes several times as long
                seconds.append(self.seconds(frame.pts))
                before = frame
        self.num_missing = len(times) - len(seconds)
        return torch.from_numpy(pixels[: len(seconds)].copy() if self.num_missing else pixels), seconds

    def warn(self, num_wanted: int) -> None:
        """Tell once what is missing or spoilt, if anything is."""
        faults = []
        if self.num_missing:
            faults.append(
                f"{self.num_missing} of the {num_wanted} wanted frames are missing (it ends at {self.last_end:.6g} s)"
            )
        if self.num_bad:
            faults.append(f"{self.num_bad} frames are spoilt")
        if faults:
            text = f"{self.name} is damaged or cut short: {', '.join(faults)}; fetch or export it again"
            warnings.warn(text, MediaWarning, stacklevel=4)


class Decoder:
    """Decodes a clip forwards, entering it at keyframes."""

    def __init__(self, clip: Clip) -> None:
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
        self._container = self._clip.open()
        self._stream = self._clip.video_stream(self._container)
        self._stream.thread_type = "AUTO"

    def shown_at(self, times: Iterable[float]) -> Iterator[Any]:
        """Yield the frame on screen at each of the ascending times: the same object while it stays there.

        Stops early at the first time at which a damaged file has none. Before the first frame, that one counts.
        """
        frames = self._frames()
        shown = ahead = next(frames, None)
        for limit in map(self._clip.ticks, times):
            before = shown
            if ahead is not None and (found := self._entry(limit, ahead.pts)) is not None:
                frames = self._enter(*found, limit)
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

    def _entry(self, limit: int, place: int) -> tuple[int, int] | None:
        """Return where to enter if that is nearer to `limit` than `place`; a few frames are decoded, not looked for."""
        if not self._can_enter or limit - place <= 8 * self._clip.gap:
            return None
        return self._clip.keyframe(limit, after=place)

    def _enter(self, target: int, key: int, limit: int) -> Iterator[Any]:
        """Return the frames from a keyframe on; from the start of the file if it cannot be entered there."""
        self._container.seek(target, stream=self._stream)
        frames = self._frames(key)
        first = next(frames, None)
        if first is not None and first.pts <= limit:
            return cast(Iterator[Any], chain((first,), frames))
        self._can_enter = False
        self._container.close()
        self._open()
        return self._frames()

    def _frames(self, key: int | None = None) -> Iterator[Any]:
        """Yield decoded frames in the order shown, from the keyframe with timestamp `key` on (None: from here)."""
        clip = self._clip
        due = clip.origin
        for packet in self._packets(key):
            for frame in self._decoded(packet):
                if not clip.is_timed or frame.pts is None:
                    frame.pts = due
                due = frame.pts + (frame.duration or clip.gap)
                yield frame

    def _packets(self, key: int | None) -> Iterator[Any]:
        """Yield packets, then None, which makes the decoder hand out what it holds back."""
        try:
            for packet in self._container.demux(self._stream):
                if key is not None and packet.is_keyframe and packet.pts == key:
                    key = None
                if packet.size and key is None:
                    yield packet
        except (av.error.FFmpegError, IndexError):
            pass  # the scout has met it too, or the frames that are missing will tell
        yield None

    def _decoded(self, packet: Any) -> list[Any]:
        try:
            return cast(list[Any], self._stream.decode(packet))
        except av.error.EOFError:
            return []
        except av.error.FFmpegError:
            self._clip.num_bad += 1
            return []

    def rgb(self, frame: Any) -> Array:
        """Return the frame upright, [3, H, W] uint8."""
        self._size = self._size or (frame.width, frame.height)
        width, height = self._size
        picture = self._reformatter.reformat(frame, width, height, "rgb24", src_color_range=int(frame.color_range))
        array = picture.to_ndarray()
        return _upright(array, frame).transpose(2, 0, 1)


def _upright(array: Array, frame: Any) -> Array:
    """Return [H, W, 3] turned and mirrored in right angles, as the frame's display matrix asks."""
    try:
        matrix = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"]))
    except KeyError:
        return array
    a, b, _, c, d = matrix[:5]  # right' = a right + c down, down' = b right + d down
    if abs(b) + abs(c) > abs(a) + abs(d):
        array, a, d = array.transpose(1, 0, 2), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
