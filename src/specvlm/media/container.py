"""Opening a file by PyAV, and which of its streams is the film."""

from __future__ import annotations

import io
from typing import Any

import av
import av.error

from specvlm.core.errors import MediaError
from specvlm.media.content import described, head_of, line_of
from specvlm.media.frames import Data

MAX_PICTURE_PIXELS = 1 << 27  # 16384 x 8192; a decoder holds several such pictures, whatever the file's length
HELD_BYTES = 512 << 20  # what the pictures may take that a decoder's threads work on at one time

_FORMATS = (  # a playlist format (hls, dash, concat) would let a file name other files and hosts, so none is here
    "mov,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,live_flv,asf,ogg,gif,apng,mjpeg,"
    "yuv4mpegpipe,nut,mxf,rm,wtv,dv,3gp,mp3,wav,flac,aac,amr,aiff,w64"
)
# FFmpeg's AV_DISPOSITION_*
_ATTACHED_PICTURE = 1 << 10  # the cover of a piece of music
_THUMBNAILS = 1 << 11
_DEPENDENT = 1 << 19  # one tile of a picture, or a layer
_STILL = 1 << 20
_MAX_LOOKED_AT = 5000  # packets read to tell a film from a still track


def open_container(name: str, data: Data) -> Any:
    """Return a new container of the file, which reads no other file or host and decodes no huge picture."""
    source = io.BytesIO(data) if isinstance(data, bytes) else f"file:{data}"
    try:
        return av.open(
            source,
            format="mjpeg" if head_of(data, 3) == b"\xff\xd8\xff" else None,  # FFmpeg knows no progressive pictures
            options={"max_pixels": str(MAX_PICTURE_PIXELS)},
            container_options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise MediaError(f"{name} cannot be read as a video{described(data, 'video')} ({line_of(error)})") from error


def open_decoder(name: str, data: Data, index: int) -> tuple[Any, Any]:
    """Return a new container and its stream `index`, whose decoder's memory is bounded."""
    container = open_container(name, data)
    stream = container.streams[index]
    context = stream.codec_context
    context.options = {"max_pixels": str(MAX_PICTURE_PIXELS)}
    context.thread_type = "AUTO"
    held = max(context.width * context.height * 4, 1)  # bytes a picture, roughly
    if (most := HELD_BYTES // held) < 16:  # as many threads as there are cores, each with a few pictures
        context.thread_count = max(most // 2, 1)
    return container, stream


def film_index(container: Any, name: str) -> int:
    """Return the index of the stream to show: FFmpeg's own choice, but no cover or still track where there is a film.

    Reads from the container where there are several streams.
    """
    films = _films(container, name)
    best = container.streams.best("video")
    if best is None or best.index not in films:
        best = max((container.streams[index] for index in films), key=_area)
    return int(best.index) if len(films) == 1 else _moving(container, films, int(best.index))


def _films(container: Any, name: str) -> list[int]:
    """Return the indices of the streams that may be the film, the likely ones alone if there are any."""
    streams = list(container.streams.video)
    own = [stream for stream in streams if not int(stream.disposition) & (_ATTACHED_PICTURE | _DEPENDENT)]
    if not own and any(int(stream.disposition) & _DEPENDENT for stream in streams):
        raise MediaError(f"{name} is a picture in tiles (heic), not a video: convert it to png or jpg")
    if not own:
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        others = f" (only {kinds})" if kinds else ""
        raise MediaError(f"{name} has no video{others}: pass a file with a video track")
    known = [stream for stream in own if stream.codec_context is not None]
    if not known:
        raise MediaError(f"{name}: its video is in a format that is not known here: convert it to mp4 (h264)")
    likely = [s for s in known if not int(s.disposition) & (_THUMBNAILS | _STILL) and _area(s)]
    return [stream.index for stream in likely or known]


def _area(stream: Any) -> int:
    return int(stream.codec_context.width * stream.codec_context.height)


def _moving(container: Any, films: list[int], best: int) -> int:
    """Return `best`, or the stream that reaches five packets while `best`, which then is a still, has at most one."""
    counts = dict.fromkeys(films, 0)
    try:
        for seen, packet in enumerate(container.demux([container.streams[index] for index in films])):
            counts[packet.stream_index] += bool(packet.size)
            if counts[best] > 1 or max(counts.values()) >= 5 or seen > _MAX_LOOKED_AT:
                break
    except (av.error.FFmpegError, IndexError):
        pass  # the reader meets it again, and tells
    most = max(counts, key=lambda index: counts[index])
    return most if counts[best] <= 1 < counts[most] else best
