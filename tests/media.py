"""Makes small real media files. Every frame shows its own number in binary, so a test can tell which one it got."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from torch import Tensor

from specvlm import MediaError, VideoConfig
from specvlm.media import load

BITS = 12
WIDTH, HEIGHT = 96, 64  # one bar of 8 pixels a bit, the lowest bit first


def fails(source: object, *words: str, kind: str = "video", error: type[Exception] = MediaError, **settings) -> str:
    """Load must raise an error of one line that contains the words."""
    with pytest.raises(error) as caught:
        load(source, VideoConfig(**settings), kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return [H, W, 3] uint8 with the number as black and white bars, and a bright top that tells up from down."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    bars = np.repeat(np.array(bits, np.uint8) * 255, width // BITS)
    row = np.concatenate([bars, np.zeros(width - len(bars), np.uint8)])
    image = np.repeat(np.repeat(row[None, :, None], height, 0), 3, 2)
    image[: height // 4] = 255
    return image


def number(pixels: Tensor) -> int:
    """Return the number that a frame [3, H, W] shows; its top must be bright."""
    gray = pixels.float().mean(0)
    height, width = gray.shape
    assert gray[: height // 8].mean() > 200, "the frame is not upright"
    bar = width // BITS
    rows = gray[height // 2 :]
    return sum(int(rows[:, bit * bar + 1 : (bit + 1) * bar - 1].mean() > 128) << bit for bit in range(BITS))


def numbers(pixels: Tensor) -> list[int]:
    """Return the number that each frame [T, 3, H, W] shows."""
    return [number(frame) for frame in pixels]


def make_video(
    path: Path,
    count: int = 30,
    *,
    codec: str = "libx264",
    rate: int | Fraction = 6,
    seconds: Sequence[Fraction] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pix_fmt: str = "yuv420p",
    gop: int = 10,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    container: str | None = None,
    rotation: int = 0,
    hflip: bool = False,
    full_range: bool = False,
    audio_seconds: float = 0,
    images: Iterable[np.ndarray] | None = None,
) -> Path:
    """Write a video of `count` numbered frames at a constant rate, or shown at `seconds`."""
    if images is None:
        images = (picture(i, *size) for i in range(count if seconds is None else len(seconds)))
    options = {"preset": "veryfast"} if options is None and codec in ("libx264", "libx265") else options or {}
    if codec == "libx265":
        options = options | {"x265-params": "log-level=none:pools=none"}
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
        stream.codec_context.thread_count = 1
        if full_range:
            stream.codec_context.color_range = 2
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        sound = file.add_stream("aac", rate=8000) if audio_seconds else None
        base = Fraction(1, 90000) if seconds is not None else 1 / Fraction(rate)
        stream.codec_context.time_base = base
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if full_range:
                frame = frame.reformat(format=pix_fmt, dst_color_range=2)
            frame.pts, frame.time_base = index if seconds is None else round(seconds[index] / base), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            _add_sound(file, sound, audio_seconds)
    return path


def make_with_still(path: Path, *, default: str, container: str | None = None) -> Path:
    """Write a still of 200 x 200 (number 4095) as the first track and a film of 60 numbered frames as the second."""
    with av.open(str(path), "w", format=container) as file:
        still = file.add_stream("mjpeg", rate=25)
        still.width = still.height = 200
        still.pix_fmt = "yuvj420p"
        film = file.add_stream("libx264", rate=10, options={"preset": "veryfast"})
        film.width, film.height, film.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for stream in (still, film):
            is_default = (stream is still) == (default == "still")
            stream.disposition = Disposition.default if is_default else Disposition(0)
        cover = av.VideoFrame.from_ndarray(picture(4095, 200, 200), format="rgb24").reformat(format="yuvj420p")
        cover.pts = 0
        file.mux(still.encode(cover))
        file.mux(still.encode(None))
        for index in range(60):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts = index
            file.mux(film.encode(frame))
        file.mux(film.encode(None))
    return path


def make_audio(path: Path, seconds: float = 1) -> Path:
    """Write a file with sound alone."""
    with av.open(str(path), "w") as file:
        _add_sound(file, file.add_stream("aac", rate=8000), seconds)
    return path


def _add_sound(file: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for start in range(0, int(seconds * 8000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def reference(path: Path) -> list[tuple[float, int]]:
    """Return (seconds, number) of every frame, by decoding all of the file in order and nothing cleverer."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        found = []
        for frame in file.decode(stream):
            rgb = frame.to_ndarray(format="rgb24")
            found.append((frame.pts, number(torch.from_numpy(rgb).permute(2, 0, 1))))
        return [(float((pts - found[0][0]) * stream.time_base), shown) for pts, shown in found]


@contextmanager
def served(bodies: dict[str, bytes]) -> Iterator[str]:
    """Serve bodies on the loopback by path; yields the base URL.

    /moved/<n>/x redirects n times and then to /x; /loop redirects to itself; /slow/x pauses before the answer;
    /chunked/x sends no length; /short/x stops half way; /status/<code> answers that.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            kind, _, rest = self.path.partition("?")[0].strip("/").partition("/")
            if kind == "loop":
                self._redirect("/loop")
            elif kind == "moved":
                left, _, target = rest.partition("/")
                self._redirect(f"/moved/{int(left) - 1}/{target}" if int(left) > 1 else f"/{target}")
            elif kind == "status":
                self._answer(int(rest), b"no")
            elif kind == "slow":
                time.sleep(0.6)
                self._answer(200, bodies[rest])
            elif kind == "chunked":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(bodies[rest])
            elif kind == "short":
                self._answer(200, bodies[rest][: len(bodies[rest]) // 2], length=len(bodies[rest]))
            else:
                self._answer(200, bodies[kind])

        def _redirect(self, target: str) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Connection", "close")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer(self, status: int, body: bytes, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the client has gone, as some tests want

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
