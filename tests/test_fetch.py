"""Where media come from: pipes, file objects, servers that misbehave, odd addresses, stills, what is in memory."""

from __future__ import annotations

import base64
import gzip
import io
import os
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from media import fails, make_video, picture
from PIL import Image

from specvlm import ConfigError, VideoConfig
from specvlm.cli.progress import no_litter
from specvlm.media import Frames, MediaWarning, download, fetch, load

C = VideoConfig


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_video(tmp_path_factory.mktemp("fetch") / "clip.mp4", 8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# Pipes


@contextmanager
def written(path: Path, data: bytes) -> Iterator[None]:
    """Write bytes into a named pipe while the block runs."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("form", [str, lambda path: f"file://{path}"])
def test_a_named_pipe_is_read_once(clip: Path, tmp_path: Path, form: Callable):
    with written(tmp_path / "pipe", clip.read_bytes()):
        assert torch.equal(load(form(tmp_path / "pipe"), C()).pixels, load(clip, C()).pixels)


def test_a_pipe_of_an_image_is_read(tmp_path: Path):
    with written(tmp_path / "pipe", encoded(Image.fromarray(picture(3)), "PNG")):
        assert load(tmp_path / "pipe", C(), kind="image").pixels.shape[0] == 1


def test_a_pipe_without_a_writer_is_given_up(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "pipe", "0.05 s", timeout=0.05)


def test_a_pipe_that_never_ends_meets_the_limit(tmp_path: Path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.write(writer, b"x" * 5000)
    try:
        fails(f"/dev/fd/{reader}", "more than 4000 bytes", max_download_bytes=4000)
    finally:
        os.close(reader)
        os.close(writer)


def test_devices_and_sockets_are_no_files(tmp_path: Path):
    fails("/dev/zero", "a device")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    fails(tmp_path / "socket", "a socket")
    listener.close()


def test_a_file_name_that_is_no_utf8_is_read(clip: Path, tmp_path: Path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    with open(path, "wb") as file:
        file.write(clip.read_bytes())
    assert len(load(os.fsdecode(path), C(num_frames=2)).pixels) == 2
    message = fails(os.fsdecode(path) + "x", "does not exist")
    message.encode()  # no lone surrogate is left


# File objects


class Broken:
    def read(self, count: int) -> bytes:
        raise OSError(5, "bad disk")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("closed", ("closed", "open binary file")),
        (type("Text", (), {"read": lambda self, n: "text"})(), ("text", "binary")),
        (type("Nothing", (), {"read": lambda self, n: None})(), ("NoneType", "binary")),
        (Broken(), ("bad disk",)),
    ],
    ids=["closed", "text", "nothing", "broken"],
)  # fmt: skip
def test_file_objects_that_cannot_be_read_are_explained(clip: Path, given: object, words: tuple[str, ...]):
    if given == "closed":
        with clip.open("rb") as file:
            pass
        given = file
    fails(given, *words)


def test_a_full_or_missing_temporary_folder_is_explained(clip: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(fetch.tempfile, "TemporaryFile", refuse)
    fails(io.BytesIO(clip.read_bytes()), "cannot be copied", "TMPDIR")


# Downloads


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve one connection after the other by a function on the socket; yield the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                try:
                    peer.recv(65536)
                    answer(peer)
                except OSError:
                    pass  # the client has gone, as it should

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4"
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)  # the accept in progress ends
        listener.close()
        thread.join(5)


def repeated(first: bytes, again: bytes) -> Callable[[socket.socket], None]:
    def answer(peer: socket.socket) -> None:
        peer.sendall(first)
        if not again:
            peer.recv(1)  # until the client has gone
            return
        for _ in range(2000):  # 20 s
            peer.sendall(again)
            threading.Event().wait(0.01)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (HEAD, b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (HEAD, b""),
        (HEAD + b"x" * 900_000, b"x"),
    ],
    ids=["continue", "headers", "drip", "drip-without-length", "drip-of-chunks", "silence", "fast-then-drip"],
)
def test_a_server_that_never_ends_is_given_up(first: bytes, again: bytes):
    with answering(repeated(first, again)) as url:
        fails(url, "0.3 s", "--timeout", timeout=0.3)


def test_what_a_packed_answer_unpacks_to_is_bounded_while_it_is_unpacked(monkeypatch):
    inner = gzip.compress(bytes(64 << 20))
    body, sizes = gzip.compress(inner), []
    original = fetch._write

    def answer(peer: socket.socket) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        peer.sendall(head.encode() + body)

    def watching(file, chunks, name, config) -> None:
        original(file, (sizes.append(len(chunk)) or chunk for chunk in chunks), name, config)

    monkeypatch.setattr(fetch, "_write", watching)
    with answering(answer) as url:
        fails(url, "unpacks to more than 3000000 bytes", max_download_bytes=3_000_000)
    assert sum(sizes) <= 3_000_000
    assert max(sizes) <= 1 << 20


@pytest.mark.parametrize("packed", [gzip.compress, lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:])])
def test_a_packed_answer_is_unpacked(clip: Path, packed: Callable[[bytes], bytes]):
    body = packed(clip.read_bytes())

    def answer(peer: socket.socket) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        peer.sendall(head.encode() + body)

    with answering(answer) as url:
        assert torch.equal(load(url, C()).pixels, load(clip, C()).pixels)


@pytest.mark.parametrize(
    ("encoding", "body", "words"),
    [
        ("br", b"xyz", ("packed as 'br'",)),
        (", ".join(["gzip"] * 900), b"xyz", ("packed as",)),
        ("gzip", b"no gzip at all", ("damaged",)),
        ("gzip", gzip.compress(b"a" * 5000)[:-12], ("end too early",)),
    ],
    ids=["brotli", "nested", "damaged", "cut"],
)
def test_an_answer_that_cannot_be_unpacked_is_explained(encoding: str, body: bytes, words: tuple[str, ...]):
    def answer(peer: socket.socket) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"
        peer.sendall(head.encode() + body)

    with answering(answer) as url:
        fails(url, *words)


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/x.mp4",
        f"http://{'a' * 64}.example/x.mp4",
        "http://xn--a/x.mp4",
        "http://\udcff/x.mp4",
        "http://127.0.0.1:1/\udcff.mp4",
        "http://127.0.0.1:99999999/x.mp4",
        "http://[::1/x.mp4",
        "http:///x.mp4",
        "http://user:secret@a..b/x.mp4?token=secret",
        "http://127.0.0.1:1/" + "a" * 70000,
        "http://\x00/x.mp4",
    ],
)
def test_an_odd_address_is_one_line(url: str):
    message = fails(url, timeout=2)
    message.encode()
    assert "secret" not in message
    assert len(message) < 600


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """An environment without proxies and certificates of its own."""
    for other in download.ENVIRONMENT:
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://user:secret@127.0.0.1:1"), ("ALL_PROXY", "gopher://x:70"),
     ("HTTP_PROXY", "http://a b:xx"), ("SSL_CERT_FILE", "/nowhere/ca.pem")],
)  # fmt: skip
def test_an_environment_that_cannot_be_used_is_named(environment, name: str, value: str):
    environment.setenv(name, value)
    assert "secret" not in fails("http://127.0.0.1:1/x.mp4", name, error=ConfigError, timeout=2)


def test_a_proxy_that_cannot_be_reached_is_named(environment):
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    fails("http://127.0.0.2:1/x.mp4", "HTTP_PROXY", timeout=2)


def test_a_copy_has_no_name_that_a_killed_process_could_leave_behind(clip: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fetch.tempfile, "tempdir", str(tmp_path))
    with fetch.located(io.BytesIO(clip.read_bytes()), C()) as (_, path):
        assert Path(str(path)).read_bytes() == clip.read_bytes()
        assert list(tmp_path.iterdir()) == []


def test_where_open_files_have_no_path_the_copy_is_deleted(clip: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fetch.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fetch, "_OPEN_FILES", str(tmp_path / "nothing"))
    with fetch.located(io.BytesIO(clip.read_bytes()), C()) as (_, path):
        assert [Path(str(path))] == list(tmp_path.iterdir())
        assert Path(str(path)).read_bytes() == clip.read_bytes()
    fails(io.BytesIO(clip.read_bytes()), "more than 10 bytes", max_download_bytes=10)
    assert list(tmp_path.iterdir()) == []


# What it is


@pytest.mark.parametrize("format", ["BMP", "TIFF", "PPM", "JPEG", "PNG", "WEBP", "AVIF"])
def test_a_still_of_any_format_is_a_video_of_one_frame(tmp_path: Path, format: str):
    data = encoded(Image.fromarray(picture(5)), format)
    assert len(load(data, C()).pixels) == 1
    (tmp_path / "still").write_bytes(data)
    assert torch.equal(load(tmp_path / "still", C()).pixels, load(data, C(), kind="image").pixels)


def test_further_pages_of_a_tiff_are_told():
    first, second = (Image.fromarray(picture(n)) for n in range(2))
    data = encoded(first, "TIFF", save_all=True, append_images=[second])
    with pytest.warns(MediaWarning, match="2 pages"):
        load(data, C())


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"#EXTM3U\n#EXT-X-VERSION:3\nclip.ts\n", "video", ("m3u8", "join")),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<MPD xmlns="x"></MPD>', "video", ("DASH",)),
        (b"ffconcat version 1.0\nfile a.mp4\n", "video", ("list of files",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "video", ("git lfs pull",)),
        (b"<!doctype html><html>", "video", ("web page",)),
        (b"hello", "video", ("text",)),
        (b"PK\x03\x04" + bytes(40), "video", ("archive",)),
        (b"%PDF-1.7\n\0", "image", ("PDF",)),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "image", ("HEIC", "jpg")),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "video", ("HEIC", "jpg")),
        (b"\x1a\x45\xdf\xa3" + bytes(40), "image", ("mkv", "as a video")),
        (b"<svg xmlns='x'></svg>", "image", ("SVG", "png")),
        (bytes(range(256)), "image", ("format is unknown", "png")),
    ],
)  # fmt: skip
def test_what_a_file_is_is_said(data: bytes, kind: str, words: tuple[str, ...]):
    fails(data, *words, kind=kind)


def test_a_video_is_no_image(clip: Path):
    fails(clip, "a video", "mp4", "pass it as a video", kind="image")


# In memory


def test_integers_of_32_bits_have_no_scale():
    fails(Image.fromarray(np.full((40, 40), 100, np.int32)), "mode I", "convert")
    fails(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "mode F", "convert", kind="image")


def test_a_png_of_16_bits_is_scaled():
    data = encoded(Image.fromarray(np.full((40, 40), 0x6400, np.uint16)), "PNG")
    assert load(data, C(), kind="image").pixels.unique().tolist() == [0x64]


def test_a_cut_png_that_was_opened_before_is_damaged():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)), "PNG")
    fails(Image.open(io.BytesIO(data[: len(data) // 2])), "damaged", kind="image")
    closed = Image.open(io.BytesIO(data))
    closed.close()
    fails(closed, "damaged")


PIXELS = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
SECONDS = torch.tensor([0.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("frames", "word"),
    [
        (Frames(PIXELS, SECONDS[:1], 2.0), "seconds"),
        (Frames(PIXELS, [0.0, 0.5], 2.0), "seconds"),
        (Frames(PIXELS, SECONDS.long(), 2.0), "seconds"),
        (Frames(PIXELS, SECONDS.flip(0), 2.0), "ascending"),
        (Frames(PIXELS, SECONDS * torch.nan, 2.0), "finite"),
        (Frames(PIXELS, SECONDS.to("meta"), 2.0), "on the meta device"),
        (Frames(PIXELS, SECONDS.to_sparse(), 2.0), "sparse_coo"),
        (Frames(PIXELS, SECONDS * 1e12, 9.0), "more than 10,000,000 times"),
        (Frames(PIXELS, SECONDS, 0.0), "fps"),
        (Frames(PIXELS, SECONDS, float("nan")), "fps"),
        (Frames(PIXELS, SECONDS, "2"), "fps"),
        (Frames(PIXELS, SECONDS, 2.0, "clip"), "kind"),
        (Frames(PIXELS.numpy(), SECONDS, 2.0), "tensor"),
        (Frames(PIXELS.movedim(1, -1), SECONDS, 2.0), "[T, 3, H, W]"),
        (Frames(PIXELS[0], SECONDS, 2.0), "[T, 3, H, W]"),
        (Frames(None, SECONDS, 2.0), "NoneType"),
    ],
)
def test_malformed_frames_are_explained(frames: Frames, word: str):
    fails(frames, word, fps=1.0)


@pytest.mark.parametrize("seconds", [SECONDS.bfloat16(), SECONDS.clone().requires_grad_()])
def test_frames_may_tell_their_seconds_in_any_float(seconds: torch.Tensor):
    assert load(Frames(PIXELS, seconds, 2.0), C(num_frames=1)).seconds.tolist() == [0.0]


class Broken:
    name = None

    def read(self, count: int) -> bytes:
        raise zlib.error("incorrect\ndata check")


def test_whatever_a_file_object_raises_is_a_line():
    fails(Broken(), "<file object> cannot be read (incorrect data check): pass an open binary file")


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device="meta"), "meta"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8).to_sparse(), "sparse"),
        (torch.nested.nested_tensor(list(PIXELS), layout=torch.jagged), "nested"),
        (np.ma.masked_array(np.zeros((2, 32, 32, 3), np.uint8), mask=True), "masked"),
        (np.full((2, 32, 32, 3), 100, np.int32), "int32"),
    ],
)
def test_arrays_without_plain_pixels_are_explained(array: object, word: str):
    fails(array, word)


def test_base64_may_be_broken_into_lines(clip: Path):
    text = base64.encodebytes(clip.read_bytes()).decode()
    assert len(load(f"data:video/mp4;base64,{text}", C(num_frames=2)).pixels) == 2


def test_the_empty_folder_of_torchs_compiler_is_taken_away(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for name, content in (("empty", None), ("used", "graph")):
        with no_litter():
            (tmp_path / name).mkdir()
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
            if content:
                (tmp_path / name / content).touch()
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
