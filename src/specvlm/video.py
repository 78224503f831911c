"""Path, URL, bytes, array or list of images -> Frames.

`load` is the only entry. Below it, in this order: what is already in memory, still images, fetching, when to sample,
and the video reader. Presentation timestamps decide which frame is shown at a time; only the groups of pictures that
contain a wanted frame are decoded, and only wanted frames are converted and kept, bit-exact and at full size.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import shutil
import struct
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, BinaryIO, TypeAlias, cast

import av
import av.error
import httpx
import numpy as np
import numpy.typing as npt
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from specvlm.config import DEFAULT_FPS, VideoConfig
from specvlm.errors import ConfigError, MediaError

MAX_FRAME_BYTES = 16 << 30
MAX_REDIRECTS = 5
_FORMATS = (  # a playlist format (hls, dash, concat) would let a file name other files and hosts, so none is here
    "mov,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,live_flv,asf,ogg,gif,apng,mjpeg,"
    "yuv4mpegpipe,nut,mxf,rm,wtv,dv,3gp,mp3,wav,flac,aac,amr,aiff,w64"
)
_ATTACHED_PICTURE = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC
_IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


class MediaWarning(UserWarning):
    """A file is damaged, but holds frames that can be used."""


@dataclass(frozen=True)
class Frames:
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
_Data: TypeAlias = str | bytes  # a path, or the file's bytes


def load(source: Source, config: VideoConfig, *, kind: str = "video") -> Frames:
    """Read a video, or one image, into memory as RGB frames of full size.

    Args:
        source: a path, a file:, http(s): or data: URL, bytes or a binary file object holding an encoded file; a uint8
            array or tensor of raw frames; a PIL image; a list of images (each in any of these forms); or Frames.
            An array of 4 axes is [T, H, W, 3] if its last axis is 3, else [T, 3, H, W]; one of 3 axes is an image.
        config: which frames. A file gives the frame on screen at each wanted time: start + i / fps, or num_frames
            evenly spread over [start, end), each another frame if the file has that many. fps above the file's own
            rate gives every frame once. Arrays and lists have no times: their frames are taken to be sampled at
            config.fps (default 2), and num_frames and max_frames thin them out. Frames are thinned out by their times.
        kind: "video" or "image"; a still picture read as a video has one frame.

    Returns:
        Frames with seconds counted from the file's first frame. Display rotation (and an image's EXIF orientation) is
        applied; the sample aspect ratio is not. The alpha of an image is composited on white, a video's is dropped.

    Raises:
        MediaError: it cannot be read, has no frames in the wanted part, or is too large; on one line.

    Warns:
        MediaWarning: the file is damaged or cut short; the frames that it has are returned.
    """
    if kind not in ("video", "image"):
        raise ConfigError(f"kind={kind!r} is not allowed: video or image")
    if isinstance(source, Frames):
        return _from_frames(source, config, kind)
    if isinstance(source, np.ndarray | Tensor):
        return _from_array(source, config, kind)
    if isinstance(source, Image.Image):
        return _still(_rgb(source, "the image"), config, kind)
    if isinstance(source, list | tuple):
        return _from_list(source, config, kind)
    with _located(source, config) as (name, data):
        if kind == "image" or _is_still(data):
            return _still(_read_image(name, data), config, kind)
        return _read_video(name, data, config)


# What is already in memory


def _still(pixels: Tensor, config: VideoConfig, kind: str) -> Frames:
    """Return one picture [3, H, W] as Frames."""
    return Frames(pixels[None], torch.zeros(1, dtype=torch.float64), config.fps or DEFAULT_FPS, kind)


def _from_frames(frames: Frames, config: VideoConfig, kind: str) -> Frames:
    """Return the part and the share of the frames that the config asks for; loading twice changes nothing."""
    _as_pixels(frames.pixels, "Frames.pixels", axes=4)
    if kind == "image":
        return replace(_one_image(frames.pixels, "Frames"), seconds=frames.seconds, fps=frames.fps)
    seconds, last = frames.seconds.cpu().numpy(), float(frames.seconds[-1])
    end = min(last + 1 / frames.fps, config.end or math.inf)
    _check_start(config, end, "Frames")
    first = max(int(np.searchsorted(seconds, config.start + 1e-6, "right")) - 1, 0)
    index = np.arange(first, max(int(np.searchsorted(seconds, end - 1e-6)), first + 1))
    fps = frames.fps
    if config.fps is not None and config.fps < fps * (1 - 1e-6):
        times = _regular(config.start, end, config.fps, slack=1e-6)
        index, fps = np.maximum(np.searchsorted(seconds, times + 1e-6, "right") - 1, first), config.fps
    thin = _thinned(len(index), config)
    if len(thin) == len(frames.seconds):
        return replace(frames, kind=kind)
    chosen = torch.from_numpy(index[thin])
    pixels = frames.pixels[chosen.to(frames.pixels.device)]
    return Frames(pixels, frames.seconds[chosen.to(frames.seconds.device)], fps * len(thin) / len(index), kind)


def _from_array(array: Array | Tensor, config: VideoConfig, kind: str) -> Frames:
    """Return raw frames [T, H, W, 3] or [T, 3, H, W], or a raw image without the T, as Frames."""
    name = f"the {'tensor' if isinstance(array, Tensor) else 'array'} of shape {list(array.shape)}"
    if kind == "image":
        return _one_image(_as_pixels(array, name, axes=array.ndim), name)
    pixels = _as_pixels(array, name, axes=4)
    index, seconds, fps = _untimed(len(pixels), config, name)
    return Frames(pixels if len(index) == len(pixels) else pixels[index], seconds, fps)


def _from_list(items: Sequence[Any], config: VideoConfig, kind: str) -> Frames:
    """Return a list of images as the frames of a video; only those wanted are read."""
    name = f"the list of {len(items)} images"
    if kind == "image":
        raise MediaError(f"{name} is not one image: pass each image by itself, or the list as a video")
    if not items:
        raise MediaError(f"{name} has no frames: pass at least one image")
    index, seconds, fps = _untimed(len(items), config, name)
    pixels: Tensor | None = None
    for row, item in enumerate(index.tolist()):
        image = load(items[item], config, kind="image").pixels[0]
        if pixels is None:
            _check_size(name, len(index), image.shape[2], image.shape[1])
            pixels = image.new_empty((len(index), *image.shape))
        if image.shape != pixels.shape[1:]:
            (_, height, width), (_, h, w) = pixels.shape[1:], image.shape
            raise MediaError(
                f"{name}: image {item} is {w}x{h}, the first is {width}x{height}: a video's frames need one size"
            )
        pixels[row] = image
    assert pixels is not None  # _untimed gives at least one index
    return Frames(pixels, seconds, fps)


def _as_pixels(array: Array | Tensor, name: str, *, axes: int) -> Tensor:
    """Return uint8 pixels [..., 3, H, W] (contiguous; a tensor stays on its device)."""
    if array.dtype not in (np.uint8, torch.uint8):
        raise MediaError(f"{name} has dtype {array.dtype}: pixels must be uint8, 0 to 255 (floats: (x * 255).round())")
    shape = tuple(array.shape)
    if array.ndim != axes or axes not in (3, 4) or 3 not in (shape[-1], shape[-3]):
        wanted = "[T, H, W, 3] or [T, 3, H, W]" if axes == 4 else "[H, W, 3] or [3, H, W]"
        raise MediaError(f"{name} is not {wanted}: reorder its axes")
    if 0 in shape:
        raise MediaError(f"{name} is empty: pass at least one frame with pixels")
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return (array.movedim(-1, -3) if shape[-1] == 3 else array).contiguous()


def _one_image(pixels: Tensor, name: str) -> Frames:
    """Return pixels [3, H, W] or [1, 3, H, W] as an image."""
    if pixels.ndim == 4 and len(pixels) != 1:
        raise MediaError(f"{name} has {len(pixels)} frames, an image has one: pass it as a video")
    return _still(pixels.reshape(pixels.shape[-3:]), VideoConfig(), "image")


def _untimed(num: int, config: VideoConfig, name: str) -> tuple[Tensor, Tensor, float]:
    """Return indices, seconds and rate of what the config asks of `num` frames that have no timestamps."""
    fps = config.fps or DEFAULT_FPS
    end = min(num / fps, config.end or math.inf)
    _check_start(config, end, name)
    first = math.ceil(config.start * fps - 1e-6)
    part = np.arange(first, max(min(math.ceil(end * fps - 1e-6), num), first + 1)).clip(max=num - 1)
    thin = _thinned(len(part), config)
    index = torch.from_numpy(part[thin])
    return index, index.to(torch.float64) / fps, fps * len(thin) / len(part)


def _thinned(num: int, config: VideoConfig) -> npt.NDArray[np.int64]:
    """Return at most num_frames (or max_frames) evenly spread indices below `num`."""
    wanted = min(num, config.num_frames or config.max_frames)
    return np.arange(wanted, dtype=np.int64) * num // wanted


# Still images


def _is_still(data: _Data) -> bool:
    """Whether these are the first bytes of a picture that does not move (animations go to the video reader)."""
    head = _head(data, 4096)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"acTL" not in head
    return head.startswith(b"\xff\xd8\xff") or (_is_webp(head) and not (head[12:16] == b"VP8X" and head[20] & 2))


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) > 20


def _read_image(name: str, data: _Data) -> Tensor:
    """Return an encoded image (of an animation, its first picture) as pixels [3, H, W]."""
    Image.init()
    formats = [known for known in _IMAGE_FORMATS if known in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats) as image:
            _check_size(name, 1, *image.size)
            return _rgb(image, name)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} is not an image{_looks_like(data)}: use png, jpg, webp, gif, bmp or tiff") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise MediaError(f"{name} is damaged and cannot be read ({_line(error)}): fetch or export it again") from error


def _rgb(image: Image.Image, name: str) -> Tensor:
    """Return the picture upright, composited on white, as pixels [3, H, W]."""
    if 0 in image.size:
        raise MediaError(f"{name} is {image.width}x{image.height}: it has no pixels")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits a pixel; PIL would clip them to 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


# From a source to a path or bytes


@contextmanager
def _located(source: Any, config: VideoConfig) -> Iterator[tuple[str, _Data]]:
    """Yield the source's name for messages, and its path or bytes; a temporary copy is deleted afterwards."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        yield _named(f"<{len(data)} bytes>", data), data
    elif hasattr(source, "read"):
        with _temporary() as path:
            name = str(getattr(source, "name", "<file object>"))
            _copy(iter(lambda: source.read(1 << 20), b""), path, name, config)
            yield _named(name, path), path
    elif not isinstance(source, str | os.PathLike):
        raise MediaError(
            f"cannot read a {type(source).__name__}: pass a path, URL, bytes, uint8 array or list of images"
        )
    elif (scheme := _scheme(path := os.fspath(source))) in ("http", "https"):
        with _temporary() as copy:
            _download(path, copy, config)
            name = _url_name(path)
            yield _named(name, copy), copy
    elif scheme == "data":
        data = _data_url(path)
        yield _named(f"{path[:30]}...", data), data
    elif scheme in ("file", ""):
        local = _file_path(path) if scheme else path
        yield _named(local, local), local
    else:
        raise MediaError(f"{_url_name(path)}: {scheme}:// is not supported: use a path, file://, http:// or https://")


def _scheme(text: str) -> str:
    """Return "" for a path, else the URL's scheme."""
    if text[:5].lower() == "data:" and "," in text:
        return "data"
    head, found, _ = text.partition("://")
    is_scheme = head.isascii() and head.replace("+", "").replace("-", "").replace(".", "").isalnum()
    return head.lower() if found and is_scheme else ""


def _file_path(url: str) -> str:
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise MediaError(f"{url}: {host} is another machine: write file:///path for a local file")
    return urllib.request.url2pathname(slash + path)


def _url_name(url: str) -> str:
    """Return the URL for messages: without user name, password and query, which may hold secrets."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"[:200]


def _data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{url[:30]}... is no valid base64 ({_line(error)}): encode the file's bytes again") from error


def _named(name: str, data: _Data) -> str:
    """Return the name on one line, or raise if there is plainly nothing to read."""
    name = " ".join(name.split())
    if isinstance(data, str):
        if "\0" in data or not os.path.exists(data):
            raise MediaError(f"{name!r} does not exist: check the path".replace("\\x00", "\\0"))
        if os.path.isdir(data):
            raise MediaError(f"{name} is a directory: pass one file, or the list of its images")
    try:
        is_empty = not _head(data, 1)
    except OSError as error:
        raise MediaError(f"{name} cannot be read ({error.strerror}): check its permissions") from error
    if is_empty:
        raise MediaError(f"{name} is empty (0 bytes): the copy or recording that made it failed")
    return name


def _head(data: _Data, count: int) -> bytes:
    """Return the first bytes."""
    if isinstance(data, bytes):
        return data[:count]
    with open(data, "rb") as file:
        return file.read(count)


@contextmanager
def _temporary() -> Iterator[str]:
    """Yield the path of a file to be made, which is deleted afterwards whatever happens."""
    folder = tempfile.mkdtemp(prefix="specvlm-")
    try:
        yield os.path.join(folder, "media")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(url: str, path: str, config: VideoConfig) -> None:
    """Stream a URL's body to a file."""
    name = _url_name(url)
    client = httpx.Client(follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=config.timeout)
    try:
        with client, client.stream("GET", url) as response:
            if response.is_error:
                raise MediaError(
                    f"{name}: the server answered {response.status_code} {response.reason_phrase}: check the URL"
                )
            if (size := response.headers.get("content-length", "")).isdigit() and int(size) > config.max_download_bytes:
                raise _too_long(name, f"has {size} bytes", config)
            _copy(response.iter_bytes(), path, name, config)
    except httpx.TimeoutException as error:
        raise MediaError(f"{name}: no answer within {config.timeout:g} s: try again or raise --timeout") from error
    except httpx.TooManyRedirects as error:
        raise MediaError(f"{name}: more than {MAX_REDIRECTS} redirects: pass the final URL") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MediaError(f"{name} cannot be fetched ({_line(error)}): check the URL and the network") from error


def _copy(chunks: Iterable[Any], path: str, name: str, config: VideoConfig) -> None:
    """Write chunks to a file, up to max_download_bytes."""
    count = 0
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                if not isinstance(chunk, bytes):
                    raise MediaError(f"{name} gives text: open it in binary mode")
                if (count := count + len(chunk)) > config.max_download_bytes:
                    raise _too_long(name, f"has more than {config.max_download_bytes} bytes", config)
                file.write(chunk)
    except OSError as error:
        raise MediaError(
            f"{name} cannot be copied to {tempfile.gettempdir()} ({_line(error)}): free some space"
        ) from error


def _too_long(name: str, fault: str, config: VideoConfig) -> MediaError:
    return MediaError(f"{name} {fault}, the limit is {config.max_download_bytes}: raise --max-download-bytes")


# Which times are wanted


def _regular(start: float, end: float, fps: float, *, slack: float) -> Floats:
    """Return start + i / fps while below `end`; ends that are measured, not given, are blurred by `slack` seconds."""
    count = max(math.ceil((end - start - min(slack, 0.25 / fps)) * fps), 1)
    return start + np.arange(count) / fps


def _spread(pts: Floats, times: Floats) -> Floats:
    """Return one time of `pts` for each of `times`, close to it but no two the same; all if there are not more."""
    if len(pts) <= len(times):
        return pts
    place = np.arange(len(times))
    shown = np.searchsorted(pts, times, "right") - 1
    rising = np.maximum.accumulate(np.maximum(shown, 0) - place) + place
    return pts[np.minimum(rising, len(pts) - len(times) + place)]


def _plan(clip: _Clip, config: VideoConfig) -> tuple[Floats, float]:
    """Return the wanted times in seconds and their rate, before a frame is decoded."""
    end = min(clip.end, config.end or math.inf)
    _check_start(config, end, clip.name)
    span, slack = end - config.start, 2e-3 if end == clip.end else 1e-6
    if (count := config.num_frames) is not None:
        if count * clip.size[0] * clip.size[1] * 3 > MAX_FRAME_BYTES:
            count = min(count, len(clip.shown_within(config.start, end)))
        _check_size(clip.name, count, *clip.size)
        return config.start + np.arange(count) * (span / count), count / span
    rate = config.fps or DEFAULT_FPS
    if (span - slack) * rate > config.max_frames:
        rate = config.max_frames / span
    if rate > clip.rate * (1 + 1e-6):  # the header says that the file has fewer: count them
        pts = clip.shown_within(config.start, end)
        gaps = np.diff(pts)
        if (own := 1 / float(gaps.mean()) if len(gaps) else 1 / span) < rate:
            rate = own
            if len(pts) <= config.max_frames and np.all(abs(gaps * own - 1) < 0.5):
                _check_size(clip.name, len(pts), *clip.size)
                return pts, rate
    _check_size(clip.name, math.ceil(span * rate), *clip.size)
    return _regular(config.start, end, rate, slack=slack)[: config.max_frames], rate


def _check_start(config: VideoConfig, end: float, name: str) -> None:
    if config.start >= end - 1e-6:
        raise MediaError(
            f"{name}: start={config.start:g} s is not before its end at {end:.6g} s: choose an earlier start"
        )


def _check_size(name: str, count: int, width: int, height: int) -> None:
    if (size := count * width * height * 3) > MAX_FRAME_BYTES:
        raise MediaError(
            f"{name}: {count} frames of {width}x{height} take {size / 2**30:.1f} GiB, the limit is "
            f"{MAX_FRAME_BYTES / 2**30:.3g} GiB: read fewer (--num-frames, --fps, --max-frames, --start, --end)"
        )


# The video reader


def _read_video(name: str, data: _Data, config: VideoConfig) -> Frames:
    """Return the wanted frames of a video file."""
    with _Clip(name, data) as clip:
        times, rate = _plan(clip, config)
        pixels, seconds = clip.read(times)
        if config.num_frames and len(set(seconds)) < len(times) and not clip.num_missing:
            end = min(clip.end, config.end or math.inf)
            times = _spread(clip.shown_within(config.start, end), times)
            pixels, seconds = clip.read(times)
            rate = len(times) / (end - config.start)
        if not seconds:
            raise MediaError(f"{name}: no frame of the wanted part can be decoded: the file is damaged, fetch it again")
        clip.warn(len(times))
    return Frames(pixels, torch.tensor(seconds, dtype=torch.float64), rate)


class _Clip:
    """A video file, looked through without decoding. Times are seconds after its first frame, ticks are its time base.

    The scout is a container of its own, so that looking for a keyframe never disturbs a decoder's place.
    """

    def __init__(self, name: str, data: _Data) -> None:
        self.name, self._data = name, data
        self.is_cut = False  # the file ends before it should
        self.num_bad = self.num_missing = 0  # packets or frames that fail to decode; wanted frames that are not there
        self._scout = self.open()
        try:
            self._look()
        except BaseException:
            self._scout.close()
            raise

    def __enter__(self) -> _Clip:
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
                f"{self.name} cannot be read as a video{_looks_like(self._data)} ({_line(error)})"
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
        with _Decoder(self) as decoder:
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


class _Decoder:
    """Decodes a clip forwards, entering it at keyframes."""

    def __init__(self, clip: _Clip) -> None:
        self._clip = clip
        self._can_enter = True
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None  # of the first frame; later ones that differ are scaled to it
        self._open()

    def __enter__(self) -> _Decoder:
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


# Messages


def _looks_like(data: _Data) -> str:
    """Return what the first bytes suggest about a file that cannot be opened, or ""."""
    head = _head(data, 512)
    if head.lstrip()[:1] == b"<" and b"html" in head.lower():
        return ": it holds a web page, so fetch the file itself"
    if _is_webp(head):
        return ": it is an animated webp, which is not supported; convert it to mp4 or gif"
    if head[4:8] == b"ftyp":
        return ": its index is missing or damaged, as after an interrupted copy or recording, so fetch it again"
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n\f\x1b" for byte in head):
        return ": it holds text"
    return ": the format is unknown or the file is damaged; convert it to mp4 (h264)"


def _line(error: Exception) -> str:
    """Return an error's own words on one line, without the file name that some repeat."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
