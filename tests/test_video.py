"""Which frames come back, from which files, and what is said about files that cannot be used."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import HEIGHT, WIDTH, fails, make_audio, make_video, number, numbers, picture, reference, served
from PIL import Image

from specvlm.core.config import VideoConfig
from specvlm.core.errors import ConfigError, MediaError
from specvlm.media import Frames, MediaWarning, fetch, frames, load, reader
from specvlm.media.clip import Entry

C = VideoConfig
THIRDS = list(range(0, 30, 3))  # of the 30 frames at 6 fps: two a second


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def clip(folder: Path) -> Path:
    """30 frames at 6 fps with B-frames and a keyframe every 10."""
    return make_video(folder / "clip.mp4")


@pytest.fixture(scope="session")
def long_clip(folder: Path) -> Path:
    """4000 frames at 20 fps with a keyframe every 40."""
    return make_video(
        folder / "long.mp4", 4000, rate=20, gop=40, options={"preset": "ultrafast", "x264-params": "scenecut=0"}
    )


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After every test: no temporary file, no open handle."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = _media_handles()
    yield
    assert list(scratch.iterdir()) == []
    assert _media_handles() == before


def _media_handles() -> list[str]:
    """The regular files that this process holds open (empty where /proc is not there)."""
    found = []
    for handle in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(handle)
        except OSError:
            continue
        if Path(target).suffix in (".mp4", ".mkv", ".ts", ".png", ".avi", ".webm") or "specvlm-" in target:
            found.append(target)
    return sorted(found)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with one item per decoded frame from here on."""
    decoded: list[int] = []
    original = reader.Decoder._decoded

    def counting(self: reader.Decoder, packet: object) -> list:
        frames = original(self, packet)
        decoded.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(reader.Decoder, "_decoded", counting)
    return decoded


# Which frames


def test_two_fps_of_six_is_every_third_frame(clip: Path):
    frames = load(clip, C(fps=2))
    assert numbers(frames.pixels) == THIRDS
    assert frames.fps == 2.0
    assert frames.seconds.tolist() == pytest.approx([n / 6 for n in THIRDS])
    assert (frames.pixels.dtype, frames.seconds.dtype, frames.kind) == (torch.uint8, torch.float64, "video")
    assert frames.pixels.shape == (10, 3, HEIGHT, WIDTH)
    assert frames.pixels.is_contiguous()


def test_two_fps_is_the_default(clip: Path):
    frames = load(clip, C())
    assert numbers(frames.pixels) == THIRDS
    assert frames.fps == 2.0


def test_pixels_are_the_decoders_own(clip: Path):
    with av.open(str(clip)) as file:
        whole = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    frames = load(clip, C(fps=2))
    assert torch.equal(frames.pixels, torch.from_numpy(whole[::3]).permute(0, 3, 1, 2))


def test_rows_columns_and_channels_stand_where_they_should(folder: Path):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48, 0], image[:32, 48:, 1], image[32:, :48, 2] = 255, 255, 255
    path = make_video(folder / "colours.mkv", codec="ffv1", pix_fmt="bgr0", images=[image] * 3)
    assert torch.equal(load(path, C(num_frames=1)).pixels[0], torch.from_numpy(image).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("settings", "expected", "fps"),
    [
        ({"num_frames": 5}, [0, 6, 12, 18, 24], 1.0),
        ({"num_frames": 1}, [0], 0.2),
        ({"num_frames": 8}, [0, 3, 7, 11, 15, 18, 22, 26], 1.6),
        ({"num_frames": 30}, list(range(30)), 6.0),
        ({"num_frames": 29}, [*range(29)], 5.8),
        ({"num_frames": 99}, list(range(30)), 6.0),
        ({"num_frames": 3, "start": 2, "end": 3}, [12, 14, 16], 3.0),
        ({"num_frames": 9, "start": 2, "end": 3}, [12, 13, 14, 15, 16, 17], 6.0),
        ({"fps": 6}, list(range(30)), 6.0),
        ({"fps": 24}, list(range(30)), 6.0),
        ({"fps": 4}, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25, 27, 28], 4.0),
        ({"fps": 0.5}, [0, 12, 24], 0.5),
        ({"fps": 2, "start": 1, "end": 2.5}, [6, 9, 12], 2.0),
        ({"fps": 2, "start": 1, "end": 2.501}, [6, 9, 12, 15], 2.0),
        ({"fps": 2, "start": 1.1}, [6, 9, 12, 15, 18, 21, 24, 27], 2.0),
        ({"fps": 2, "start": 4.95}, [29], 2.0),
        ({"fps": 2, "end": 100}, THIRDS, 2.0),
        ({"max_frames": 5}, [0, 6, 12, 18, 24], 1.0),
        ({"fps": 6, "max_frames": 10}, THIRDS, 2.0),
        ({"fps": 24, "max_frames": 10}, THIRDS, 2.0),
    ],
)
def test_settings_choose_frames(clip: Path, settings: dict, expected: list[int], fps: float):
    frames = load(clip, C(**settings))
    got = numbers(frames.pixels)
    if settings == {"num_frames": 29}:
        assert got == sorted(set(got))  # 29 different ones of 30, whichever is left out
        assert len(got) == 29
    else:
        assert got == expected
    assert frames.fps == pytest.approx(fps, rel=1e-9)
    assert frames.seconds.tolist() == pytest.approx([n / 6 for n in got])


FILES = {
    "b.mp4": {"options": {"preset": "veryfast", "bf": "3"}},
    "b.mkv": {"options": {"preset": "veryfast", "bf": "3"}},
    "open-gop.mkv": {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}},
    "intra-refresh.ts": {"options": {"preset": "veryfast", "x264-params": "intra-refresh=1:bframes=0"}},
    "b.ts": {},
    "b.flv": {},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "part4.mp4": {"codec": "mpeg4"},
    "part4.avi": {"codec": "mpeg4"},
    "hevc.mp4": {"codec": "libx265", "rate": 25, "options": {"preset": "ultrafast"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "scm=0:pred-struct=1"}},
    "ntsc.mp4": {"rate": Fraction(30000, 1001)},
    "ntsc.mkv": {"rate": Fraction(30000, 1001)},
}


@pytest.fixture(scope="session")
def made(folder: Path) -> dict[str, tuple[Path, list[tuple[float, int]]]]:
    """Every file that can be made here, with what a plain decode of all of it shows."""
    found = {}
    for name, options in FILES.items():
        codec = options.get("codec", "libx264")
        if codec in av.codecs_available:
            path = make_video(folder / name, 60, **{"rate": 10} | options)
            found[name] = (path, reference(path))
            assert [n for _, n in found[name][1]] == list(range(60)), f"{name} is too lossy to tell its frames apart"
    return found


def expected_at(shown: list[tuple[float, int]], times: list[float], slack: float) -> list[int]:
    """The plain rule: the last frame whose time is not after t; before the first frame, the first."""
    return [([n for s, n in shown if s <= t + slack] or [shown[0][1]])[-1] for t in times]


@pytest.mark.parametrize("name", FILES)
def test_every_format_agrees_with_a_full_decode(made: dict, name: str):
    if name not in made:
        pytest.skip("this build of PyAV has no such encoder")
    path, shown = made[name]
    slack = 5.1e-4 if name.endswith(("mkv", "webm", "flv")) else 1e-5  # half a tick
    length = shown[-1][0] + (shown[1][0] - shown[0][0])
    for fps in (0.4, 1, 3, 7.3):
        for start in (0.0, 0.37, length * 0.6, length * 0.9):
            for end in (start + 0.21, length * 0.95):
                frames = load(path, C(fps=fps, start=start, end=end))
                count = 1
                while start + count / fps < end - 1e-6:
                    count += 1
                times = [start + i / fps for i in range(count)]
                assert numbers(frames.pixels) == expected_at(shown, times, slack), (fps, start, end)
                assert frames.fps == fps
                by_number = {n: s for s, n in shown}
                assert frames.seconds.tolist() == pytest.approx([by_number[n] for n in numbers(frames.pixels)])
    for count in (1, 4, 13):
        for start in (0.0, length * 0.5):
            frames = load(path, C(num_frames=count, start=start))
            times = [start + i * (length - start) / count for i in range(count)]
            assert numbers(frames.pixels) == expected_at(shown, times, slack + 1e-4), (count, start)
            assert frames.fps == pytest.approx(count / (length - start), rel=1e-3)


def test_b_frames_in_avi_come_in_the_order_shown(folder: Path):
    path = make_video(folder / "reordered.avi")  # its timestamps say 1, 4, 3, 5, 2
    assert numbers(load(path, C(fps=2)).pixels) == THIRDS


def test_a_raw_stream_without_timestamps_is_read(folder: Path):
    path = make_video(folder / "raw.h264", container="h264")
    frames = load(path, C(fps=2))
    assert numbers(frames.pixels) == THIRDS
    assert frames.seconds.tolist() == pytest.approx([n / 6 for n in THIRDS])
    assert numbers(load(path, C(fps=2, start=4)).pixels) == [24, 27]


def test_gif_times_of_a_hundredth_are_taken_as_rounded(folder: Path):
    path = make_video(folder / "anim.gif", codec="gif", pix_fmt="rgb8")
    assert numbers(load(path, C(fps=3)).pixels) == list(range(0, 30, 2))


SLOW = [Fraction(n, 2) for n in range(10)]  # 0 to 4.5 s, every half second
FAST = [5 + Fraction(n, 20) for n in range(20)]  # 5 to 5.95 s, every 50 ms


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_follows_the_timestamps(folder: Path, suffix: str):
    path = make_video(folder / f"vfr.{suffix}", seconds=SLOW + FAST, rate=20)
    frames = load(path, C(fps=2))
    assert numbers(frames.pixels) == [*range(10), 10, 20]
    assert frames.seconds.tolist() == pytest.approx([i / 2 for i in range(12)])
    assert numbers(load(path, C(fps=4, start=4)).pixels) == [8, 8, 9, 9, 10, 15, 20, 25]
    assert numbers(load(path, C(num_frames=3)).pixels) == [0, 4, 8]


def test_num_frames_are_different_frames_where_the_file_has_them(folder: Path):
    path = make_video(folder / "still-then-fast.mp4", seconds=[Fraction(0), *FAST], rate=20)
    got = numbers(load(path, C(num_frames=12)).pixels)
    assert got == sorted(set(got))
    assert len(got) == 12
    assert numbers(load(path, C(num_frames=40)).pixels) == list(range(21))


def test_fps_above_the_mean_rate_of_an_uneven_file_stays_even(folder: Path):
    path = make_video(folder / "uneven.mp4", seconds=SLOW + FAST, rate=20)
    frames = load(path, C(fps=100))
    rate = 29 / 5.95  # 30 frames, the last at 5.95 s
    assert frames.fps == pytest.approx(rate)
    expected = expected_at(reference(path), [i / rate for i in range(30)], 1e-5)
    assert numbers(frames.pixels)[:29] == expected[:29]


def test_a_slow_file_gives_every_frame_once(folder: Path):
    path = make_video(folder / "slides.mp4", seconds=[Fraction(5 * n) for n in range(4)], rate=1)
    frames = load(path, C(fps=2))
    assert numbers(frames.pixels) == [0, 1, 2, 3]
    assert frames.fps == pytest.approx(0.2)


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_time_zero_is_the_first_frame(folder: Path, suffix: str):
    path = make_video(folder / f"late.{suffix}", seconds=[7 + Fraction(n, 6) for n in range(30)])
    frames = load(path, C(fps=2))
    assert numbers(frames.pixels) == THIRDS
    assert frames.seconds[0] == 0
    assert numbers(load(path, C(fps=2, start=4)).pixels) == [24, 27]


def test_an_edit_list_that_trims_is_honoured(clip: Path):
    data = bytearray(clip.read_bytes())
    entry = data.index(b"elst") + 12  # one entry: the length in ms, then where it begins, in ticks of 1/12288 s
    length, begin = struct.unpack(">Ii", data[entry : entry + 8])
    assert length == 5000
    data[entry : entry + 8] = struct.pack(">Ii", 2500, begin + 7 * 2048)
    frames = load(data, C(fps=6))
    assert numbers(frames.pixels) == list(range(7, 22))
    assert frames.seconds[0] == 0


def test_longer_sound_adds_no_frames_and_is_no_damage(folder: Path):
    for suffix in ("mp4", "mkv"):
        path = make_video(folder / f"sound.{suffix}", audio_seconds=9)
        assert numbers(load(path, C(fps=2)).pixels) == THIRDS
    untold = path.read_bytes().replace(b"DURATION", b"SOMEWHAT")  # then only the file's own length of 9 s is stated
    assert numbers(load(untold, C(fps=2)).pixels) == THIRDS


def test_decoding_times_are_no_presentation_times(folder: Path):
    seconds = [Fraction(0), *(10 + Fraction(n, 20) for n in range(20))]
    path = make_video(folder / "held.mp4", seconds=seconds, rate=20, container_options={"use_editlist": "0"})
    data = bytearray(path.read_bytes())
    header = data.index(b"mdhd") + 16  # its clock's rate, then the length: some writers state the sum of decoding times
    (clock,) = struct.unpack(">I", data[header : header + 4])
    data[header + 4 : header + 8] = struct.pack(">I", clock * 2095 // 100)
    assert numbers(load(data, C(fps=1)).pixels) == [0] * 10 + [1]


def test_one_frame(folder: Path):
    frames = load(make_video(folder / "one.mp4", 1), C())
    assert numbers(frames.pixels) == [0]
    assert (frames.fps, frames.seconds.tolist()) == (2.0, [0.0])


# How much is decoded


@pytest.mark.parametrize(
    ("settings", "expected", "most"),
    [
        ({"num_frames": 4}, [0, 1000, 2000, 3000], 120),
        ({"fps": 0.1, "start": 150}, [3000, 3200, 3400, 3600, 3800], 150),
        ({"fps": 1, "start": 199.96, "end": 200}, [3999], 80),
        ({"fps": 10, "start": 100, "end": 101}, [2000, 2002, 2004, 2006, 2008, 2010, 2012, 2014, 2016, 2018], 90),
    ],
)
def test_a_long_file_is_not_decoded(long_clip: Path, monkeypatch, settings: dict, expected: list[int], most: int):
    decoded = count_decoded(monkeypatch)
    assert numbers(load(long_clip, C(**settings)).pixels) == expected
    assert len(decoded) <= most


def test_dense_frames_are_decoded_once_each(long_clip: Path, monkeypatch):
    decoded = count_decoded(monkeypatch)
    assert len(load(long_clip, C(fps=1, end=40, start=0)).pixels) == 40
    assert len(decoded) == len(set(decoded)) < 860


def test_a_file_that_cannot_be_entered_is_read_from_the_start(clip: Path, monkeypatch):
    monkeypatch.setattr(
        reader.Clip, "entry", lambda self, limit, after: Entry(limit + 1, target=limit)
    )  # there is none such
    assert numbers(load(clip, C(fps=0.4)).pixels) == [0, 15]


def test_memory_is_bounded_before_decoding(clip: Path, monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 5 * WIDTH * HEIGHT * 3)
    decoded = count_decoded(monkeypatch)
    fails(clip, "clip.mp4", "10 frames of 96x64", "--num-frames", fps=2)
    fails(clip, "30 frames", num_frames=10**12)
    fails(clip, "10 frames", "--fps", fps=1000, max_frames=10)
    assert decoded == []
    assert len(load(clip, C(num_frames=5)).pixels) == 5


# Pictures as they are meant to be seen


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("hflip", [False, True])
def test_display_rotation_is_applied(folder: Path, rotation: int, hflip: bool):
    upright = picture(0b1011)
    mirrored = upright[:, ::-1] if hflip else upright
    stored = np.ascontiguousarray(np.rot90(mirrored, -rotation // 90))  # shown turned counterclockwise, then mirrored
    path = make_video(
        folder / f"turned{rotation}{hflip}.mp4",
        images=[stored] * 3,
        size=(stored.shape[1], stored.shape[0]),
        rotation=rotation,
        hflip=hflip,
    )
    frames = load(path, C(num_frames=1))
    assert frames.pixels.shape == (1, 3, HEIGHT, WIDTH)
    assert numbers(frames.pixels) == [0b1011]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("odd.mkv", {"codec": "ffv1", "size": (97, 65)}),
        ("odd.mp4", {"codec": "libx264", "pix_fmt": "yuv444p", "size": (101, 67)}),
        ("ten.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le", "rate": 25, "options": {"preset": "ultrafast"}}),
        ("gray.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
        ("alpha.mkv", {"codec": "ffv1", "pix_fmt": "bgra"}),
        ("alpha.mov", {"codec": "qtrle", "pix_fmt": "argb"}),
        ("sixteen.mkv", {"codec": "ffv1", "pix_fmt": "gray16le"}),
    ],
)
def test_sizes_and_pixel_formats(folder: Path, name: str, settings: dict):
    frames = load(make_video(folder / name, 6, **settings), C(num_frames=6))
    width, height = settings.get("size", (WIDTH, HEIGHT))
    assert frames.pixels.shape == (6, 3, height, width)
    assert numbers(frames.pixels) == list(range(6))


@pytest.mark.parametrize("full_range", [False, True])
def test_luma_range_is_honoured(folder: Path, full_range: bool):
    grays = [np.full((64, 96, 3), value, np.uint8) for value in (20, 128, 250)]
    path = make_video(
        folder / f"range{full_range}.mkv", codec="ffv1", pix_fmt="yuv444p", images=grays, full_range=full_range
    )
    pixels = load(path, C(num_frames=3)).pixels
    assert [int(p.float().mean().round()) for p in pixels] == pytest.approx([20, 128, 250], abs=1)


def test_a_size_that_changes_is_scaled_to_the_first(folder: Path):
    settings = {"options": {"preset": "ultrafast"}}  # without B-frames, which shift the clock
    small = make_video(folder / "small.ts", 6, **settings).read_bytes()
    seconds = [1 + Fraction(n, 6) for n in range(6)]
    large = make_video(folder / "large.ts", size=(192, 128), seconds=seconds, **settings)
    path = folder / "both.ts"
    path.write_bytes(small + large.read_bytes())
    frames = load(path, C(fps=2, end=2))
    assert frames.pixels.shape[1:] == (3, HEIGHT, WIDTH)
    assert numbers(frames.pixels) == [0, 3, 0, 3]


# Where it comes from


def test_every_way_to_name_a_file_gives_the_same(clip: Path):
    plain = load(str(clip), C())
    data = clip.read_bytes()
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    with open(clip, "rb") as file:
        sources = [clip, clip.as_uri(), f"file://localhost{clip}", data, bytearray(data), io.BytesIO(data), file, url]
        for source in sources:
            frames = load(source, C())
            assert torch.equal(frames.pixels, plain.pixels)
            assert torch.equal(frames.seconds, plain.seconds)


def test_a_file_url_may_hold_escapes_and_a_path_odd_signs(clip: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("with space %41.mp4", "a:b.mp4", "concat:x.mp4", "%03d.mp4", "é.mp4", "no suffix"):
        path = tmp_path / name
        path.write_bytes(clip.read_bytes())
        assert len(load(name, C()).pixels) == 10
        assert len(load(path, C()).pixels) == 10
        assert len(load(path.as_uri(), C()).pixels) == 10


def test_a_url_is_fetched(clip: Path):
    with served({"clip.mp4": clip.read_bytes()}) as base:
        for path in ("clip.mp4?token=1", "moved/3/clip.mp4", "chunked/clip.mp4"):
            assert numbers(load(f"{base}/{path}", C()).pixels) == THIRDS


def test_a_url_that_cannot_be_used_is_explained(clip: Path, tmp_path: Path):
    data = clip.read_bytes()
    page = b"<!doctype html><html><body>sign in</body></html>"
    with served({"clip.mp4": data, "page": page, "none": b""}) as base:
        fails(f"{base}/status/404", "/status/404", "404")
        fails(f"{base}/status/500", "500")
        fails(f"{base}/loop", "redirects")
        fails(f"{base}/moved/6/clip.mp4", "redirects")
        fails(f"{base}/slow/clip.mp4", "0.2 s", "--timeout", timeout=0.2)
        fails(f"{base}/short/clip.mp4", "cannot be fetched")
        fails(f"{base}/clip.mp4", f"{len(data)} bytes", "--max-download-bytes", max_download_bytes=len(data) - 1)
        fails(f"{base}/chunked/clip.mp4", "more than 1000", "--max-download-bytes", max_download_bytes=1000)
        fails(f"{base}/page", "web page")
        fails(f"{base}/none", "empty")
        assert "secret" not in fails(base.replace("//", "//me:secret@") + "/status/401?key=secret", "401")
        assert len(load(f"{base}/clip.mp4", C(max_download_bytes=len(data))).pixels) == 10
    fails(f"{base}/clip.mp4", "cannot be fetched")  # nobody listens any more
    fails("ftp://host/clip.mp4", "ftp", "https://")
    fails("http://[bad/clip.mp4", "[bad", "cannot be fetched")
    fails("file://elsewhere/clip.mp4", "elsewhere")
    fails("data:video/mp4;base64,***", "base64")
    fails(io.BytesIO(data), "--max-download-bytes", max_download_bytes=1000)
    fails(io.StringIO("text"), "binary")


# Files that cannot be used


def test_unusable_files_are_explained(folder: Path, tmp_path: Path, clip: Path):
    fails(tmp_path / "gone.mp4", "gone.mp4", "does not exist")
    fails("nul\0byte.mp4", "does not exist")
    fails("two\nlines.mp4", "does not exist")
    fails(tmp_path, str(tmp_path), "is a directory: pass one file")
    (tmp_path / "empty.mp4").touch()
    fails(tmp_path / "empty.mp4", "empty (0 bytes)")
    fails(b"", "empty")
    (tmp_path / "text.mp4").write_text("not a video\n" * 99)
    fails(tmp_path / "text.mp4", "text.mp4", "holds text")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    fails(tmp_path / "noise.mp4", "noise.mp4", "cannot be read as a video")
    fails(make_audio(folder / "sound.m4a"), "sound.m4a", "no video (only audio)")
    fails(make_audio(folder / "sound.mkv"), "no video (only audio)")
    with av.open(str(tmp_path / "none.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=6)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        file.mux(stream.encode(None))
    fails(tmp_path / "none.mp4", "none.mp4")
    fails(3, "int")
    fails(None, "NoneType")
    fails(clip, "start=5", "its end", start=5)
    fails(clip, "start=60", start=60)
    with pytest.raises(ConfigError, match="kind"):
        load(clip, C(), kind="movie")


def test_an_unreadable_file_is_explained(clip: Path, monkeypatch):
    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(clip))  # a mode of 0 does not stop root

    monkeypatch.setattr(fetch, "head_of", refuse)
    fails(clip, "clip.mp4 cannot be read (Permission denied)", "permissions")


def test_a_playlist_opens_no_other_file(clip: Path, tmp_path: Path):
    listing = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{clip}\n#EXT-X-ENDLIST\n"
    for name, text in [
        ("list.m3u8", listing),
        ("list.mp4", listing),
        ("list.ffconcat", f"ffconcat version 1.0\nfile {clip}\n"),
    ]:
        (tmp_path / name).write_text(text)
        fails(tmp_path / name, name)
    fails(listing.encode(), "cannot be read")


def test_a_missing_index_is_explained(clip: Path, tmp_path: Path):
    data = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov")])
    fails(tmp_path / "cut.mp4", "cut.mp4", "index is missing or damaged", "fetch it again")


@pytest.mark.parametrize(
    ("suffix", "container_options"),
    [("mp4", {"movflags": "faststart"}), ("mkv", None), ("avi", None)],
)
def test_a_cut_file_gives_what_it_has_and_warns_once(folder: Path, suffix: str, container_options: dict | None):
    codec = {"options": {"preset": "ultrafast"}} if suffix != "avi" else {"codec": "mpeg4"}
    noise = np.random.default_rng(0).integers(0, 255, (60, HEIGHT, WIDTH, 3), np.uint8)
    for index, image in enumerate(noise):
        image[: HEIGHT // 4] = 255
        image[HEIGHT // 2 :] = picture(index)[HEIGHT // 2 :]
    whole = make_video(folder / f"whole.{suffix}", images=noise, container_options=container_options, **codec)
    data = whole.read_bytes()
    cut = folder / f"cut.{suffix}"
    cut.write_bytes(data[: len(data) // 2])
    for settings, step, total in [({"fps": 2}, 3, 20), ({"fps": 1}, 6, 10), ({"num_frames": 20}, 3, 20)]:
        if suffix == "avi" and "num_frames" in settings:
            continue  # its header is believed only as far as the file goes, so the span is not known
        with pytest.warns(MediaWarning) as caught:
            frames = load(cut, C(**settings))
        got = len(frames.pixels)
        assert total * 0.2 < got < total * 0.8
        assert numbers(frames.pixels) == [step * i for i in range(got)]
        assert frames.fps == settings.get("fps", 2)
        assert len(caught) == 1
        if suffix != "avi":
            assert f"{total - got} of the {total} wanted frames are missing" in str(caught[0].message)
        assert "wanted frames are missing" in str(caught[0].message)
        assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as quiet:
        warnings.simplefilter("always")
        assert len(load(cut, C(fps=2, end=2)).pixels) == 4  # this part is all there
        fails(cut, f"cut.{suffix}", "damaged", start=4.5 if suffix == "avi" else 9)
    assert quiet == []


def test_spoilt_packets_are_skipped_and_told(folder: Path):
    path = make_video(folder / "good.mkv", 30, codec="ffv1", options={"slicecrc": "1", "slices": "4"}, gop=1)
    with av.open(str(path)) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        whole = bytes(next(p for i, p in enumerate(file.demux(video=0)) if i == 3))
    start = bytes(data).index(whole)
    data[start : start + len(whole)] = b"\xff" * len(whole)
    spoilt = folder / "spoilt.mkv"
    spoilt.write_bytes(data)
    assert len(places) == 30
    with pytest.warns(MediaWarning, match="spoilt"):
        frames = load(spoilt, C(fps=6))
    assert len(frames.pixels) == 30
    assert numbers(frames.pixels[4:]) == list(range(4, 30))


@pytest.mark.filterwarnings("ignore::specvlm.media.frames.MediaWarning")
def test_damage_of_any_kind_raises_nothing_else(made: dict):
    rng = np.random.default_rng(0)
    outcomes = set()
    for round in range(90):
        name = ("b.mp4", "b.mkv", "b.ts", "part4.avi", "b.flv", "fragments.mp4")[round % 6]
        data = bytearray(made[name][0].read_bytes())
        if round % 3 == 0:
            del data[rng.integers(1, len(data)) :]
        for place in rng.integers(0, len(data), rng.integers(1, 30)):
            data[place] = rng.integers(256)
        message, frames = "", None
        try:
            frames = load(data, C(num_frames=70) if round % 2 else C(fps=1, start=1))
        except MediaError as error:
            message = str(error)
        outcomes.add("refused" if frames is None else "read")
        assert "\n" not in message
        if frames is not None:
            assert len(frames.pixels) == len(frames.seconds) > 0
            assert bool((frames.seconds.diff() >= 0).all())
    assert outcomes == {"refused", "read"}


# Images


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_image_file_is_one_frame(tmp_path: Path, format: str, kind: str):
    path = tmp_path / "image.bin"
    path.write_bytes(_encoded(Image.fromarray(picture(77)), format))
    frames = load(path, C(), kind=kind)
    assert numbers(frames.pixels) == [77]
    assert (frames.kind, frames.seconds.tolist(), frames.fps) == (kind, [0.0], 2.0)


def test_an_animation_is_never_taken_for_a_still():
    first, *others = [Image.fromarray(picture(n)) for n in range(4)]
    shown = {"save_all": True, "append_images": others, "duration": 500}
    assert numbers(load(_encoded(first, "GIF", **shown), C(fps=2)).pixels) == [0, 1, 2, 3]
    assert numbers(load(_encoded(first, "PNG", **shown), C(fps=2)).pixels) == [0, 1, 2, 3]
    fails(_encoded(first, "WEBP", **shown), "animated webp", "mp4")
    for format in ("GIF", "PNG", "WEBP"):
        assert numbers(load(_encoded(first, format, **shown), C(), kind="image").pixels) == [0]


def test_every_way_to_name_an_image_gives_the_same(tmp_path: Path):
    data = _encoded(Image.fromarray(picture(5)), "PNG")
    (tmp_path / "image.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with served({"image.png": data}) as base:
        for source in (tmp_path / "image.png", data, url, f"{base}/image.png", io.BytesIO(data)):
            frames = load(source, C(), kind="image")
            assert torch.equal(frames.pixels[0], torch.from_numpy(picture(5)).permute(2, 0, 1))
            assert frames.kind == "image"


def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    stored = Image.fromarray(picture(9)).transpose(Image.Transpose.ROTATE_90)
    frames = load(_encoded(stored, "PNG", exif=exif.tobytes()), C(), kind="image")
    assert numbers(frames.pixels) == [9]


def test_alpha_is_composited_on_white_and_every_mode_is_rgb():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    for shown in (image, image.convert("P")):
        pixels = load(shown, C(), kind="image").pixels[0]
        assert pixels[:, 0, 0].tolist() == [0, 0, 200]
        assert pixels[:, 0, 7].tolist() == [255, 255, 255]
    assert load(Image.new("L", (4, 4), 99), C(), kind="image").pixels.unique().tolist() == [99]
    assert load(Image.new("1", (4, 4), 1), C(), kind="image").pixels.unique().tolist() == [255]
    deep = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    assert load(deep, C(), kind="image").pixels.unique().tolist() == [0x80]
    assert load(_encoded(deep, "PNG"), C(), kind="image").pixels.unique().tolist() == [0x80]


def test_unusable_images_are_explained(tmp_path: Path, clip: Path):
    data = _encoded(Image.fromarray(picture(5)), "PNG")
    fails(data[: len(data) // 2], "damaged", kind="image")
    fails(clip, "clip.mp4", "not an image", kind="image")
    fails(b"words", "holds text", kind="image")
    fails(tmp_path / "gone.png", "does not exist", kind="image")
    fails([data], "list", kind="image")
    fails(np.zeros((2, 4, 4, 3), np.uint8), "2 frames", kind="image")


# What is already in memory


VIDEO = np.stack([picture(n) for n in range(12)])


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_arrays_of_both_orders(make):
    for array in (VIDEO, VIDEO.transpose(0, 3, 1, 2)):
        frames = load(make(array), C())
        assert numbers(frames.pixels) == list(range(12))
        assert frames.pixels.is_contiguous()
        assert (frames.fps, frames.seconds.tolist()) == (2.0, [n / 2 for n in range(12)])
    assert numbers(load(make(VIDEO[4]), C(), kind="image").pixels) == [4]
    assert numbers(load(make(VIDEO[4:5]), C(), kind="image").pixels) == [4]


def test_an_array_that_may_not_be_written_or_runs_backwards_is_fine():
    frozen = VIDEO.copy()
    frozen.flags.writeable = False
    assert numbers(load(frozen, C()).pixels) == list(range(12))
    assert numbers(load(VIDEO[::-1], C()).pixels) == list(range(11, -1, -1))


@pytest.mark.parametrize(
    ("settings", "expected", "seconds", "fps"),
    [
        ({"num_frames": 4}, [0, 3, 6, 9], [0, 1.5, 3, 4.5], 2 / 3),
        ({"num_frames": 5}, [0, 2, 4, 7, 9], [0, 1, 2, 3.5, 4.5], 5 / 6),
        ({"num_frames": 99}, list(range(12)), [n / 2 for n in range(12)], 2.0),
        ({"fps": 6}, list(range(12)), [n / 6 for n in range(12)], 6.0),
        ({"fps": 4, "start": 1, "end": 2}, [4, 5, 6, 7], [1, 1.25, 1.5, 1.75], 4.0),
        ({"max_frames": 6}, [0, 2, 4, 6, 8, 10], [0, 1, 2, 3, 4, 5], 1.0),
        ({"fps": 3, "start": 1.1, "end": 1.2}, [4], [4 / 3], 3.0),
    ],
)
def test_frames_without_times(settings: dict, expected: list[int], seconds: list[float], fps: float):
    images = [Image.fromarray(image) for image in VIDEO]
    for source in (VIDEO, images, tuple(VIDEO)):
        frames = load(source, C(**settings))
        assert numbers(frames.pixels) == expected
        assert frames.seconds.tolist() == pytest.approx(seconds)
        assert frames.fps == pytest.approx(fps)


def test_a_list_may_mix_forms_and_only_wanted_images_are_read(tmp_path: Path):
    Image.fromarray(picture(1)).save(tmp_path / "one.png")
    items = [Image.fromarray(picture(0)), tmp_path / "one.png", torch.from_numpy(picture(2)), picture(3)]
    assert numbers(load(items, C()).pixels) == [0, 1, 2, 3]
    assert numbers(load([items[0], tmp_path / "gone.png", items[2]], C(num_frames=1)).pixels) == [0]


def test_unusable_arrays_and_lists_are_explained():
    fails(VIDEO.astype(np.float32) / 255, "float32", "uint8")
    fails(torch.zeros(2, 3, 4, 4), "torch.float32", "uint8")
    fails(VIDEO[0], "[T, H, W, 3]")
    fails(np.zeros((2, 4, 4, 4), np.uint8), "[2, 4, 4, 4]", "[T, 3, H, W]")
    fails(np.zeros((0, 4, 4, 3), np.uint8), "empty")
    fails(np.zeros((4, 4), np.uint8), "[H, W, 3]", kind="image")
    fails([], "no frames")
    fails([picture(0), picture(1, 48, 64)], "image 1 is 48x64", "96x64")
    fails([3], "int")
    fails(VIDEO, "start=6", start=6)
    fails([b"no image"], "not an image")


def test_frames_are_returned_as_they_are(clip: Path):
    for settings in ({}, {"fps": 2.0}, {"num_frames": 8}, {"fps": 4, "start": 1.1, "end": 3.3}, {"fps": 30}):
        frames = load(clip, C(**settings))
        again = load(frames, C(**settings))
        assert torch.equal(again.pixels, frames.pixels), settings
        assert torch.equal(again.seconds, frames.seconds)
        assert again.fps == frames.fps


def test_frames_are_thinned_out_by_their_own_times(clip: Path):
    frames = load(clip, C(fps=6))
    for settings in ({"fps": 2}, {"num_frames": 5}, {"start": 2.0, "end": 3.5}, {"max_frames": 15}):
        fewer = load(frames, C(**settings))
        shown = numbers(fewer.pixels)
        assert shown == {"fps": THIRDS, "num_frames": [0, 6, 12, 18, 24], "start": list(range(12, 21))}.get(
            next(iter(settings)), list(range(0, 30, 2))
        )
        assert fewer.seconds.tolist() == pytest.approx([n / 6 for n in shown])
        assert fewer.fps == pytest.approx(
            {"fps": 2, "num_frames": 1, "start": 6, "max_frames": 3}[next(iter(settings))]
        )
    fails(frames, "start=9", start=9)


def test_frames_can_be_an_image():
    still = Frames(torch.from_numpy(picture(3)).permute(2, 0, 1)[None].contiguous(), torch.zeros(1).double(), 2.0)
    assert load(still, C(), kind="image").kind == "image"
    assert number(load(still, C(), kind="image").pixels[0]) == 3
    fails(Frames(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2.0).double(), 1.0), "2 frames", kind="image")
    fails(Frames(torch.zeros(2, 3, 4, 4), torch.arange(2.0).double(), 1.0), "uint8")


def test_peak_memory_follows_the_wanted_frames(folder: Path):
    path = make_video(folder / "hd.mp4", 60, size=(1280, 720), options={"preset": "ultrafast"}, rate=30)
    program = (
        "import resource, sys\n"
        "from specvlm.core.config import VideoConfig\n"
        "from specvlm.media import load\n"
        "load(sys.argv[1], VideoConfig(num_frames=1))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "load(sys.argv[1], VideoConfig(num_frames=4, start=1))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000  # KiB; all 60 frames would take 162,000
