"""Files that are not one sound film alone: several tracks, clocks that start again, cut, huge, odd or of stills."""

from __future__ import annotations

import io
import re
import resource
import struct
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import HEIGHT, WIDTH, make_video, make_with_still, numbers, picture
from PIL import Image

from specvlm.core.config import VideoConfig
from specvlm.core.errors import MediaError
from specvlm.media import MediaWarning, frames, load
from specvlm.media.clip import Clip
from specvlm.media.decoder import Decoder

C = VideoConfig
EVERY_FIFTH = list(range(0, 60, 5))  # of 60 frames at 10 fps: two a second


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


def fails(source: object, *words: str, **settings: object) -> str:
    """Load must raise a MediaError of one line that contains the words."""
    with pytest.raises(MediaError) as caught:
        load(source, C(**settings))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def shown(source: object, **settings: object) -> list[int]:
    """The numbers of the frames."""
    return numbers(load(source, C(**settings)).pixels)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with one item per decoded frame from here on."""
    decoded: list[int] = []
    original = Decoder._decoded

    def counting(self: Decoder, packet: object) -> list:
        found = original(self, packet)
        decoded.extend(frame.pts or 0 for frame in found)
        return found

    monkeypatch.setattr(Decoder, "_decoded", counting)
    return decoded


# Which stream


@pytest.mark.parametrize("default", ["film", "still"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
def test_a_still_track_before_the_film_is_not_the_film(folder: Path, suffix: str, default: str):
    path = make_with_still(folder / f"still-{default}.{suffix}", default=default)
    assert shown(path) == EVERY_FIFTH
    assert load(path, C(num_frames=1)).pixels.shape == (1, 3, HEIGHT, WIDTH)


def test_a_still_alone_is_a_film_of_one_frame(folder: Path):
    path = make_video(folder / "still.mkv", 1, codec="mjpeg", pix_fmt="yuvj420p")
    assert shown(path) == [0]


def test_an_animated_avif_is_a_film_and_not_its_cover(folder: Path):
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this build of PyAV has no such encoder")
    path = make_video(folder / "moving.avif", 60, rate=10, codec="libsvtav1", options={"preset": "12"})
    assert shown(path) == EVERY_FIFTH


# Times


def _joined(folder: Path, name: str, *parts: Path) -> Path:
    path = folder / name
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def _part(folder: Path, name: str, first: int, begin: float = 0, **settings: object) -> Path:
    """Thirty frames at 10 fps, numbered from `first` on, with timestamps from `begin` on."""
    seconds = [Fraction(begin) + Fraction(n, 10) for n in range(30)]
    images = [picture(first + n) for n in range(30)]
    return make_video(folder / name, images=images, seconds=seconds, rate=10, **settings)


FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}


@pytest.mark.parametrize("suffix", ["ts", "mkv", "webm"])
def test_joined_recordings_are_read_to_the_end(folder: Path, suffix: str):
    settings: dict = {"webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}}
    parts = [_part(folder, f"{n}.{suffix}", n, **settings.get(suffix, {})) for n in (0, 30)]
    path = _joined(folder, f"joined.{suffix}", *parts)
    found = load(path, C(fps=2))
    assert numbers(found.pixels) == EVERY_FIFTH
    assert found.seconds.tolist() == pytest.approx([n / 10 for n in EVERY_FIFTH], abs=2e-3)
    assert shown(path, fps=2, start=3) == EVERY_FIFTH[6:]
    assert shown(path, num_frames=6) == EVERY_FIFTH[::2]
    assert shown(path, num_frames=100) == list(range(60))


def test_joined_recordings_of_mpeg_1_are_read_to_the_end(folder: Path):
    parts = [
        make_video(folder / f"{n}.mpg", rate=25, codec="mpeg1video", images=[picture(n + i) for i in range(30)])
        for n in (0, 30)
    ]
    assert shown(_joined(folder, "joined.mpg", *parts), num_frames=12) == EVERY_FIFTH


def test_joined_fragments_are_read_and_what_is_left_out_is_told(folder: Path):
    parts = [_part(folder, f"{n}.mp4", n, **FRAGMENTS) for n in (0, 30)]
    with pytest.warns(MediaWarning, match="a second file is joined to it, whose first frames are not read"):
        assert shown(_joined(folder, "joined.mp4", *parts)) == EVERY_FIFTH[:6] + EVERY_FIFTH[8:]  # FFmpeg drops a group


@pytest.mark.parametrize("begin", [3600, 20, 50_000])
def test_a_broadcast_whose_clock_leaps_is_continuous(folder: Path, begin: float):
    parts = [_part(folder, "early.ts", 0), _part(folder, f"late{begin:.0f}.ts", 30, begin)]
    assert shown(_joined(folder, f"leap{begin:.0f}.ts", *parts)) == EVERY_FIFTH
    assert shown(_joined(folder, f"back{begin:.0f}.ts", *reversed(parts))) == EVERY_FIFTH[6:] + EVERY_FIFTH[:6]


def test_a_broadcast_clock_that_wraps_around_goes_on(folder: Path):
    seconds = [Fraction(2**33, 90000) - 3 + Fraction(n, 10) for n in range(60)]
    path = make_video(folder / "wraps.ts", seconds=seconds, rate=10)
    found = load(path, C(fps=2))
    assert numbers(found.pixels) == EVERY_FIFTH
    assert found.seconds.tolist() == pytest.approx([n / 10 for n in EVERY_FIFTH], abs=1e-3)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "flv"])
@pytest.mark.parametrize("step", [10, 25])
def test_a_picture_that_stands_still_keeps_its_time(folder: Path, suffix: str, step: int):
    path = make_video(folder / f"slides{step}.{suffix}", seconds=[Fraction(step * n) for n in range(12)], rate=10)
    found = load(path, C(fps=1 / step))
    assert numbers(found.pixels) == list(range(12))
    assert found.seconds.tolist() == pytest.approx([step * n for n in range(12)])


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_times_that_leap_elsewhere_are_kept_and_told(folder: Path, suffix: str):
    seconds = [Fraction(n, 10) + 3600 * (n >= 30) for n in range(60)]
    path = make_video(folder / f"leap.{suffix}", seconds=seconds, rate=10)
    with pytest.warns(MediaWarning, match=r"leap by 3600\.1 s at 2\.9 s, so \d+ of \d+ frames are the same"):
        found = load(path, C(fps=2))
    assert set(numbers(found.pixels)) >= {29}
    assert shown(path, fps=2, end=3) == EVERY_FIFTH[:6]


def test_times_that_do_not_rise_are_counted_and_told(folder: Path):
    data = bytearray(
        make_video(folder / "stuck.mp4", 60, rate=10, options={"preset": "veryfast", "bf": "0"}).read_bytes()
    )
    table = data.index(b"stts")
    assert struct.unpack(">III", data[table + 8 : table + 20])[:2] == (1, 60)
    data[table + 16 : table + 20] = struct.pack(">I", 0)  # every frame lasts no time
    with pytest.warns(MediaWarning, match="timestamps that cannot be right: they do not rise"):
        assert len(load(data, C(fps=1000)).pixels) == 60


@pytest.mark.parametrize("times", ["again", "falling", "all zero"])
def test_matroska_whose_times_are_wrong_within(folder: Path, times: str):
    path = make_video(folder / "blocks.mkv", 60, rate=20, gop=60, codec="mpeg4")  # one keyframe: one cluster
    data = bytearray(path.read_bytes())
    blocks = re.finditer(rb"\xa3(?:[\x81-\xff]|[\x40-\x7f].)\x81(..)[\x80\0]", data, re.DOTALL)
    places = [found.start(1) for found in blocks]
    told = [struct.unpack(">h", data[place : place + 2])[0] for place in places]
    assert told == [50 * n for n in range(60)]
    wrong = {"again": told[:30] * 2, "falling": told[::-1], "all zero": [0] * 60}[times]
    for place, value in zip(places, wrong, strict=True):
        data[place : place + 2] = struct.pack(">h", value)
    if times == "again":
        assert shown(data, num_frames=12) == EVERY_FIFTH
        return
    with pytest.warns(MediaWarning, match="do not rise, so its frames are taken to follow at 20 a second"):
        assert shown(data, num_frames=12) == EVERY_FIFTH


@pytest.mark.parametrize("suffix", ["flv", "asf", "mp4", "apng", "ivf"])
def test_a_second_file_that_is_not_read_is_told(folder: Path, suffix: str):
    settings: dict = {
        "asf": {"codec": "mpeg4"},
        "apng": {"codec": "apng", "pix_fmt": "rgb24"},
        "ivf": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    }.get(suffix, {})
    part = make_video(folder / f"part.{suffix}", 60, rate=10, **settings)
    with pytest.warns(MediaWarning, match="a second file joined to it|stops before its end"):
        assert shown(_joined(folder, f"two.{suffix}", part, part))[:12] == EVERY_FIFTH


# Cut files


def _noisy(count: int = 60) -> list[np.ndarray]:
    """Numbered pictures with noise between top and bars, so that all frames are of about one size when encoded."""
    noise = np.random.default_rng(0).integers(0, 255, (count, HEIGHT, WIDTH, 3), np.uint8)
    for index, image in enumerate(noise):
        image[: HEIGHT // 4] = 255
        image[HEIGHT // 2 :] = picture(index)[HEIGHT // 2 :]
    return list(noise)


CONTAINERS: dict[str, dict] = {
    "mp4": {"container_options": {"movflags": "faststart"}},
    "fragments.mp4": FRAGMENTS,
    "mkv": {},
    "webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "avi": {"codec": "mpeg4"},
    "asf": {"codec": "mpeg4"},
    "wmv": {"codec": "wmv2"},
    "flv": {},
    "ogg": {"codec": "libvpx", "container": "ogg", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "y4m": {"codec": "rawvideo", "container": "yuv4mpegpipe"},
    "ivf": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": "mjpeg"},
    "mxf": {"codec": "mpeg2video", "rate": 25},
    "live.mkv": {"container_options": {"live": "1"}},
    "ts": {},
    "m2ts": {"container": "mpegts", "container_options": {"mpegts_m2ts_mode": "1"}},
    "mpg": {"codec": "mpeg1video", "rate": 25},
    "nut": {},
    "h264": {"container": "h264"},
}
CANNOT_TELL = {"mpg", "nut", "h264"}  # nothing in the container says how much there should be


@pytest.fixture(scope="session")
def whole(folder: Path) -> dict[str, Path]:
    """One sound file of every container."""
    images = _noisy()
    missing = {name for name, how in CONTAINERS.items() if how.get("codec", "libx264") not in av.codecs_available}
    return {
        name: make_video(folder / f"whole.{name}", images=images, **({"rate": 10} | how))
        for name, how in CONTAINERS.items()
        if name not in missing
    }


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_sound_file_is_never_called_cut(whole: dict[str, Path], name: str):
    if name not in whole:
        pytest.skip("this build of PyAV has no such encoder")
    rate = CONTAINERS[name].get("rate", 10)
    for source in (whole[name], whole[name].read_bytes()):
        got = shown(source, num_frames=12)  # a warning is an error here
        assert got == pytest.approx(EVERY_FIFTH, abs=1), (name, rate)
    assert len(shown(whole[name], fps=5)) >= 10


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in CANNOT_TELL])
def test_a_file_cut_in_the_middle_is_told(whole: dict[str, Path], name: str):
    if name not in whole:
        pytest.skip("this build of PyAV has no such encoder")
    data = whole[name].read_bytes()
    cut = data[: len(data) // 2 + 7]
    with pytest.warns(MediaWarning, match="is damaged or cut short") as caught:
        got = shown(cut, fps=5)
    assert len(caught) == 1
    assert caught[0].filename == __file__ or "media" in caught[0].filename
    assert 0 < len(got) <= 60
    assert got[:3] == sorted(got[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(cut, C(num_frames=1, end=0.3))  # this part is all there


@pytest.mark.parametrize("name", ["fragments.mp4", "mkv", "live.mkv", "ogg", "y4m", "avi", "asf"])
def test_the_least_cut_at_the_end_is_told(whole: dict[str, Path], name: str):
    data = whole[name].read_bytes()
    with pytest.warns(MediaWarning, match="is damaged or cut short"):
        load(data[:-200], C(fps=5))


def test_an_avi_whose_header_says_twice_as_many_frames_is_told(whole: dict[str, Path]):
    data = whole["avi"].read_bytes()
    with pytest.warns(MediaWarning, match=r"of the 12 wanted frames are missing"):
        got = shown(data[: len(data) // 2], num_frames=12)
    assert got == EVERY_FIFTH[: len(got)]


# Memory


def test_more_frames_than_there_are_take_no_memory(folder: Path, monkeypatch):
    path = make_video(folder / "few.mp4", 32, rate=10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert shown(path, num_frames=200_000) == list(range(32))  # 3.4 GiB if each were kept
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 31 * WIDTH * HEIGHT * 3)
    fails(path, "32 frames of 96x64 take", "GiB, the limit is", "--num-frames", num_frames=200_000)


def test_a_header_that_claims_a_high_rate_takes_no_memory(folder: Path, monkeypatch):
    path = make_video(folder / "claims.mkv", seconds=[Fraction(n) for n in range(32)], rate=1000)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 64 * WIDTH * HEIGHT * 3)
    assert shown(path, num_frames=30_000) == list(range(32))


def _gif(width: int, height: int, count: int = 1) -> bytes:
    """Return a GIF of few bytes: every picture changes one pixel of the canvas."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    one = b"\x21\xf9\x04\x04\x0a\0\0\0," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + one * count + b";"


@pytest.mark.parametrize("size", [(65535, 65535), (20000, 20000), (65535, 2050)])
def test_a_huge_canvas_is_refused_with_its_numbers(size: tuple[int, int]):
    width, height = size
    fails(_gif(*size), f"1 frame of {width}x{height} takes {width * height * 3 / 2**30:.1f} GiB", "limit", "pixels")


def test_a_narrow_canvas_is_read():
    assert load(_gif(65535, 1), C(num_frames=1)).pixels.shape == (1, 3, 1, 65535)


def test_a_size_that_grows_huge_is_spoilt_and_takes_no_memory(folder: Path, monkeypatch):
    images = [Image.fromarray(picture(n)) for n in range(3)]
    images.append(Image.new("RGB", (12000, 12000)))  # 412 MiB
    data = b""
    for image in images:
        out = io.BytesIO()
        image.save(out, "JPEG")
        data += out.getvalue()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.warns(MediaWarning, match="spoilt"):
        assert shown(data)[:3] == [0, 1, 2]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_threads_are_fewer_where_pictures_are_large(folder: Path):
    small = make_video(folder / "small.mp4", 2)
    large = make_video(folder / "large.mkv", 1, size=(7680, 4320), codec="mjpeg", pix_fmt="yuvj420p")
    counts = []
    for path in (small, large):
        with Clip("clip", str(path), C()) as clip:
            container, stream = clip.decoder()
            counts.append(stream.codec_context.thread_count)
            container.close()
    assert counts[0] in (0, 1) or counts[0] > counts[1]
    assert counts[1] == 2


@pytest.mark.parametrize("name", ["h264", "mjpeg", "m4v", "mkv", "asf"])
def test_of_many_keyframes_few_are_decoded(folder: Path, monkeypatch, name: str):
    settings: dict = {
        "h264": {"container": "h264", "options": {"preset": "ultrafast", "g": "1"}},
        "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": "mjpeg"},
        "m4v": {"codec": "mpeg4", "gop": 1, "container": "m4v"},
        "asf": {"codec": "mpeg4", "gop": 1},
        "mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container_options": {"live": "1"}},
    }[name]
    path = make_video(folder / f"keys.{name}", 1000, rate=1000, **settings)
    decoded = count_decoded(monkeypatch)
    got = shown(path, num_frames=8)
    assert got == pytest.approx([125 * n for n in range(8)], abs=40)  # m4v: 25 fps by its header
    assert len(decoded) <= 30


def test_peak_memory_is_bounded_by_what_is_returned(tmp_path: Path):
    (tmp_path / "canvas.gif").write_bytes(_gif(4000, 4000, 200))  # 4.6 kB; 46 MiB a frame in RGB, 9 GiB in all
    program = (
        "import resource, sys\n"
        "from specvlm.core.config import VideoConfig\n"
        "from specvlm.media import load\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(load(sys.argv[1], VideoConfig(num_frames=2, end=0.5)).pixels.nbytes)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    path = str(tmp_path / "canvas.gif")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    returned, peak = map(int, done.stdout.split())
    assert returned == 2 * 4000 * 4000 * 3
    assert peak * 1024 < returned + 10 * 4000 * 4000 * 4


# Odd values


@pytest.mark.parametrize("value", ["inf:00:00", "nan:nan:nan", "1e300:00:00", "-5:00:00", "999999:0:0", "00:00:1e400"])
def test_lengths_that_cannot_be_are_not_believed(whole: dict[str, Path], value: str):
    data = whole["mkv"].read_bytes()
    assert data.count(b"00:00:06.000000000") == 1
    data = data.replace(b"00:00:06.000000000", value.encode().ljust(18, b"\0"))
    place = data.index(b"\x44\x89") + 3  # the file's own length, a float of 8 bytes
    assert struct.unpack(">d", data[place : place + 8]) == (6000.0,)
    for length in (6000.0, float("inf"), float("nan"), 1e300, -1.0):
        odd = data[:place] + struct.pack(">d", length) + data[place + 8 :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MediaWarning)
            found = load(odd, C(fps=2))
        assert numbers(found.pixels)[: len(EVERY_FIFTH)] == EVERY_FIFTH
        assert bool(torch.isfinite(found.seconds).all())


@pytest.mark.parametrize("scale", [1, 2**31 - 1, 2**32 - 1])
def test_clocks_at_both_extremes_are_read(whole: dict[str, Path], scale: int):
    data = bytearray(whole["mp4"].read_bytes())
    place = data.index(b"mdhd") + 16
    data[place : place + 4] = struct.pack(">I", scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MediaWarning)
        found = load(data, C(fps=2))
    assert 1 <= len(found.pixels) <= 768
    assert bool(torch.isfinite(found.seconds).all())


@pytest.mark.filterwarnings("ignore::specvlm.media.frames.MediaWarning")
def test_hostile_bytes_end_in_frames_or_a_line(whole: dict[str, Path]):
    rng = np.random.default_rng(1)
    names = sorted(set(whole) - {"y4m", "mxf"})
    outcomes = set()
    for round in range(240):
        data = bytearray(whole[names[round % len(names)]].read_bytes())
        if round % 4 == 0:
            del data[rng.integers(1, len(data)) :]
        reach = 600 if round % 4 == 1 else len(data)  # the headers alone
        for place in rng.integers(0, min(len(data), reach), rng.integers(1, 12)):
            data[place] = rng.integers(256)
        if round % 4 == 3:
            place = rng.integers(0, len(data) - 8)
            data[place : place + 8] = bytes([rng.choice([0, 0x7F, 0xFF])]) * 8
        try:
            found = load(bytes(data), (C(num_frames=5000), C(fps=1, start=1), C())[round % 3])
        except MediaError as error:
            outcomes.add("refused" if "\n" not in str(error) else str(error))
        else:
            outcomes.add("read")
            assert 0 < len(found.pixels) == len(found.seconds) <= 5000
            assert bool(torch.isfinite(found.seconds).all())
            assert 0 < found.fps < float("inf")
            assert bool((found.seconds.diff() >= 0).all())
    assert outcomes == {"read", "refused"}


# Rows of stills


def _jpeg(number: int, size: tuple[int, int] = (WIDTH, HEIGHT), **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(number, *size)).save(out, "JPEG", quality=95, **options)
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_row_of_jpegs_is_as_many_frames(options: dict):
    row = b"".join(_jpeg(n, **options) for n in range(10))
    found = load(row, C())
    assert numbers(found.pixels) == list(range(10))
    assert (found.fps, found.seconds.tolist()) == (2.0, [n / 2 for n in range(10)])  # as a list of images
    assert numbers(load(row, C(fps=25)).pixels) == list(range(10))
    assert numbers(load(row, C(num_frames=5)).pixels) == [0, 2, 4, 6, 8]
    assert numbers(load(row, C(start=2)).pixels) == list(range(4, 10))
    assert numbers(load(row, C(), kind="image").pixels) == [0]


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "PGM", "PBM"])
def test_a_row_of_other_pictures_is_its_first_with_a_warning(form: str):
    out = io.BytesIO()
    mode = {"PGM": "L", "PBM": "1"}.get(form, "RGB")
    Image.fromarray(picture(7)).convert(mode).save(out, "PPM" if form in ("PGM", "PBM") else form)
    assert shown(out.getvalue()) == shown(out.getvalue() + bytes(9)) == [7]
    with pytest.warns(MediaWarning, match="has more pictures behind the first, which alone is read"):
        assert numbers(load(out.getvalue() * 3, C()).pixels) == [7]
    assert numbers(load(out.getvalue() * 3, C(), kind="image").pixels) == [7]


def test_one_jpeg_with_more_behind_it_is_a_still():
    photo = _jpeg(7)
    assert shown(photo) == [7]
    assert shown(photo + _jpeg(8, (48, 32))) == [7]  # a preview or a gain map
    assert shown(photo + b"\0\0\0\x18ftypmp42" + bytes(99)) == [7]  # a motion photo
    out = io.BytesIO()
    pair = [Image.fromarray(picture(n)) for n in (7, 8)]
    pair[0].save(out, "MPO", save_all=True, append_images=pair[1:], quality=95)
    assert shown(out.getvalue()) == [7]  # a stereo pair
