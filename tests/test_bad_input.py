"""Bad input: one line on stderr that names the value and the remedy, exit status 2, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings

import media
import pytest
import tiny
import torch

from specvlm import SpecVLM
from specvlm.cli import main as cli

TARGET = tiny.checkpoint("qwen2_5_vl", "target")
PATHS = {"TARGET": TARGET, "OTHER_FAMILY": tiny.checkpoint("qwen2_vl", "draft")}  # they differ from run to run

SETTINGS = {  # command line -> what its line must say
    "clip.mp4 --keep-ratio 2": ["keep_ratio=2.0", "at most 1"],
    "clip.mp4 --keep-ratio 0": ["keep_ratio=0.0", "above 0"],
    "clip.mp4 --keep-ratio nan": ["keep_ratio=nan", "must be float"],
    "clip.mp4 --keep-ratio ten": ["--keep-ratio", "'ten'", "--help"],
    "clip.mp4 --keep-tokens 0": ["keep_tokens=0", "at least 1"],
    "clip.mp4 --mass 1.5": ["mass=1.5", "from 0 to 1"],
    "clip.mp4 --spacing log": ["--spacing", "'log'", "grid", "sequence"],
    "clip.mp4 --pruner best": ["pruner='best'", "attention", "verifier"],
    "clip.mp4 --drafter best": ["drafter='best'", "model", "none"],
    "clip.mp4 --tree best": ["tree='best'", "chain:N"],
    "clip.mp4 --tree chain:0": ["tree='chain:0'", "1 to"],
    "clip.mp4 --tree chain:x": ["tree='chain:x'", "chain:5"],
    "clip.mp4 --tree 0,00,000,2x": ["'2x'", "digits"],
    "clip.mp4 --tree 0,12": ["'12'", "add '1'"],
    "clip.mp4 --max-new-tokens 0": ["max_new_tokens=0", "at least 1"],
    "clip.mp4 --max-new-tokens 1.5": ["--max-new-tokens", "'1.5'"],
    "clip.mp4 --temperature -1": ["temperature=-1.0", "0 (greedy)"],
    "clip.mp4 --top-p 0": ["top_p=0.0", "above 0"],
    "clip.mp4 --num-frames 4 --fps 1": ["fps=1.0", "not both"],
    "clip.mp4 --num-frames 0": ["num_frames=0", "at least 1"],
    "clip.mp4 --fps 0": ["fps=0.0", "above 0"],
    "clip.mp4 --start 3 --end 2": ["end=2.0", "later than start (3 s)"],
    "clip.mp4 --max-pixels 5": ["max_pixels=5", "at least 784"],
    "clip.mp4 --keepratio 0.5": ["'--keepratio'", "describe --help"],
    "clip.mp4 prompt more": ["'more'", "describe --help"],
    "clip.mp4 --no-draft --draft x": ["draft='x'", "--no-draft"],
    "": ["VIDEO", "describe --help"],
}
MODELS = {
    "clip.mp4 --target /nowhere/model": ["no directory /nowhere/model", "directory or hub id"],
    "clip.mp4 --target models/empty": ["models/empty", "config.json"],
    "clip.mp4 --target models/broken": ["models/broken", "config.json"],
    "clip.mp4 --target models/foo": ["'foo'", "qwen2_5_vl", "llava_onevision"],
    "clip.mp4 --target models/headless": ["models/headless", "cannot load"],
    "clip.mp4 --target TARGET --draft OTHER_FAMILY": ["qwen2_vl", "qwen2_5_vl", "target's family"],
    "clip.mp4 --target TARGET --draft models/swapped": ["token ", "models/swapped", "tokenizers", "differ"],
    "clip.mp4 --device abacus": ["device='abacus'", "cpu"],
    "clip.mp4 --device cuda:99": ["device='cuda:99'", "auto or cpu"],
    "clip.mp4 --dtype float8": ["dtype='float8'", "bfloat16"],
}
MEDIA = {
    "missing.mp4": ["missing.mp4", "does not exist"],
    "missing.mp4 --no-draft": ["missing.mp4", "does not exist"],
    "models": ["models", "director"],
    "empty.mp4": ["empty.mp4", "empty"],
    "text.mp4": ["text.mp4", "text"],
    "sound.mp4": ["sound.mp4", "no video", "audio"],
    "header.mp4": ["header.mp4"],
    "ftp://host/clip.mp4": ["ftp://", "not supported"],
    "http://127.0.0.1:9/clip.mp4": ["http://127.0.0.1:9/clip.mp4"],
    "clip.mp4 --start 100": ["clip.mp4", "start=100", "5 s", "earlier start"],
    "clip.mp4 --max-new-tokens 5000": ["5000", "4096", "fewer frames", "--max-new-tokens 4037 would fit"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of usable and unusable files."""
    folder = tmp_path_factory.mktemp("bad")
    clip = media.make_video(folder / "clip.mp4", 30, options={"preset": "veryfast"}).read_bytes()
    media.make_audio(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video at all\n" * 50)
    (folder / "header.mp4").write_bytes(clip[:40])
    whole = media.make_video(folder / "whole.mp4", 120, container_options={"movflags": "faststart"}).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    for name, config in {"broken": "{", "foo": '{"model_type": "foo"}', "headless": None, "empty": None}.items():
        (folder / "models" / name).mkdir(parents=True)
        if config:
            (folder / "models" / name / "config.json").write_text(config)
    shutil.copy(f"{TARGET}/config.json", folder / "models/headless")
    shutil.copytree(TARGET, folder / "models/swapped")
    _swap_tokens(folder / "models/swapped/tokenizer.json")
    return folder


def _swap_tokens(path):
    """Exchange the ids of two plain tokens."""
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def nothing_left(files, tmp_path, monkeypatch):
    """Run every test in the folder of files; no file may appear there or among the temporary ones."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(files.rglob("*"))
    yield
    assert sorted(files.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; return its line."""

    def refused(*argv):
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[-1]) == ("", 1, "\n")
        assert err.startswith("specvlm: ")
        return err

    return refused


def says(line, wanted):
    return all(any(part in line for part in parts.split("|")) for parts in wanted)


def words(line):
    return [PATHS.get(word, word) for word in line.split()]


def describe(line):
    models = "" if "--target" in line else " --target TARGET"
    return words(f"describe {line}{models}{'' if '--max-new' in line else ' --max-new-tokens 4'}")


@pytest.mark.parametrize(("line", "wanted"), SETTINGS.items())
def test_settings(refused, line, wanted):
    assert says(refused("describe", *words(line)), wanted)


@pytest.mark.parametrize(("line", "wanted"), MODELS.items())
def test_models(refused, line, wanted):
    assert says(refused(*describe(line)), wanted)


@pytest.mark.parametrize(("line", "wanted"), MEDIA.items())
def test_media(refused, line, wanted):
    assert says(refused(*describe(line)), wanted)


def test_a_prompt_longer_than_the_context(refused):
    line = refused("describe", "clip.mp4", "ball " * 5000, "--target", TARGET, "--max-new-tokens", "4")
    assert says(line, ["prompt tokens", "4096", "fewer frames", "shorten the text"])


@pytest.mark.parametrize(
    ("line", "wanted"),
    {
        "": ["COMMAND", "--help"],
        "explain clip.mp4": ["'explain'", "describe", "compare", "inspect"],
        "inspect clip.mp4": ["--output", "inspect --help"],
        "inspect clip.mp4 -o a.jpg": ["'a.jpg'", ".png"],
        "inspect clip.mp4 -o nowhere/a.png": ["'nowhere/a.png'", "create it"],
        "inspect clip.mp4 -o folder.png": ["'folder.png'", "folder"],
        "inspect clip.mp4 -o a.png --temperature 1": ["'--temperature'", "inspect --help"],
        "compare clip.mp4 --target TARGET": ["draft", "give --draft"],
        "compare clip.mp4 --drafter none": ["drafter='none'", "--draft"],
    }.items(),
)
def test_commands(refused, line, wanted, files):
    (files / "folder.png").mkdir()
    try:
        assert says(refused(*words(line)), wanted)
    finally:
        (files / "folder.png").rmdir()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where nobody may write")
def test_a_picture_that_cannot_be_written(refused):
    line = refused("inspect", "clip.mp4", "-o", "/proc/a.png", "--target", TARGET)
    assert says(line, ["'/proc/a.png'", "other|another"])


def test_stdin_that_is_too_large(refused, monkeypatch):
    with open("clip.mp4", encoding="latin-1") as file:
        monkeypatch.setattr(sys, "stdin", file)
        line = refused("describe", "-", "--max-download-bytes", "100")
    assert says(line, ["stdin", "100 bytes", "--max-download-bytes"])


def test_a_truncated_file_gives_the_frames_it_has_and_a_warning(capsys):
    argv = ["describe", "cut.mp4", "--target", TARGET, "--max-new-tokens", "4", "--json"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["usage"]["visual_tokens"] > 0
    assert (err.count("\n"), err[:17]) == (1, "specvlm: warning:")
    assert "cut.mp4" in err
    assert cli.main([*argv, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


# Faults while a command runs


@pytest.fixture
def failing(monkeypatch):
    """Let the run of a request end in an error."""

    def failing(error):
        def generate_request(*_):
            warnings.warn("a library's chatter", FutureWarning, stacklevel=1)
            raise error

        monkeypatch.setattr(SpecVLM, "generate_request", generate_request)

    return failing


RUN = ("describe", "clip.mp4", "--target", TARGET)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual"), "the GPU"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "this machine"),
        (MemoryError(), "this machine"),
    ],
)
def test_out_of_memory(refused, failing, error, place):
    failing(error)
    line = refused(*RUN)
    assert says(line, ["out of memory", place, "--num-frames", "--max-pixels"])
    assert "manual" not in line


def test_a_fault_of_ours_keeps_its_traceback(failing):
    failing(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(RUN)


def test_an_interrupt_is_one_line_and_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(RUN) == 130
    assert capsys.readouterr() == ("", "specvlm: interrupted\n")


# In a process of its own


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("describe clip.mp4 --keep-ratio 2", ["keep_ratio=2.0"]),
        ("describe missing.mp4", ["missing.mp4"]),
        ("describe text.mp4 --target TARGET", ["text.mp4"]),
    ],
)
def test_the_program_ends_with_2_and_one_line(line, wanted):
    done = subprocess.run([sys.executable, "-m", "specvlm", *words(line)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("specvlm: ")
    assert says(done.stderr, wanted)


def test_a_reader_that_goes_away():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as stdout:
        assert _help_to(stdout) == "specvlm: stdout was closed before all was written: read it to its end\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk():
    with open("/dev/full", "w") as stdout:
        assert _help_to(stdout) == "specvlm: no space left on the device: free some, or write elsewhere\n"


def _help_to(stdout):
    """Print the help to a file that cannot take it; return what stderr says."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "specvlm", "--help"]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    return done.stderr
