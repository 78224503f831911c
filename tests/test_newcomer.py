"""A newcomer's day on the command line: several videos, narrow terminals, closed descriptors, settings in vain."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import media
import numpy as np
import pytest
import tiny

from specvlm import CapacityError, SpecVLM
from specvlm.cli import console
from specvlm.cli import main as cli
from specvlm.engine.effects import SettingWarning
from specvlm.engine.fit import FitWarning
from specvlm.engine.text import Chunk
from specvlm.prune import PRUNERS
from specvlm.speculate.drafters import DRAFTERS

TARGET = tiny.checkpoint("qwen2_5_vl", "target")
MODEL = ("--target", TARGET)
PAIR = (*MODEL, "--draft", tiny.checkpoint("qwen2_5_vl", "near"))
SHORT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of other colours, a film without an extension, and a folder of notes."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name, red in (("a.mp4", 200), ("b.mp4", 60)):
        images = [np.full((64, 96, 3), (red, 40 + 8 * number, 20), np.uint8) for number in range(8)]
        media.make_video(folder / name, 8, rate=2, images=images)
    (folder / "film").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "--a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "h\u00e9 \udcff.mp4").write_bytes((folder / "a.mp4").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def answer(run, *argv):
    code, out, err = run("describe", *argv, *MODEL, *SHORT, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# Videos and the question


@pytest.mark.parametrize(
    ("words", "videos", "prompt"),
    [
        (["a.mp4"], ["a.mp4"], "Describe the video in detail."),
        (["a.mp4", "What?"], ["a.mp4"], "What?"),
        (["a.mp4", "b.mp4"], ["a.mp4", "b.mp4"], "Describe the video in detail."),
        (["a.mp4", "b.mp4", "Which is red?"], ["a.mp4", "b.mp4"], "Which is red?"),
        (["a.mp4", "b.mp4", "-p", "b.mp4?"], ["a.mp4", "b.mp4"], "b.mp4?"),
        (["a.mp4", "--fps", "1", "b.mp4", "--keep-ratio", "1", "Which?"], ["a.mp4", "b.mp4"], "Which?"),
        (["film", "-p", "film"], ["film"], "film"),
        (["--", "--a.mp4"], ["--a.mp4"], "Describe the video in detail."),
        (["h\u00e9 \udcff.mp4", " \udcff"], ["h\u00e9 \ufffd.mp4"], " \ufffd"),
    ],
)
def test_words_are_videos_but_for_a_last_one_that_is_none(run, words, videos, prompt):
    first = words[words.index("--") :] if "--" in words else []
    words = words[: len(words) - len(first)]
    code, out, _ = run("describe", *words, *MODEL, *SHORT, "--json", *first)
    assert code == 0
    content = json.loads(out)
    assert [one["source"] for one in content["media"]] == videos
    assert content["prompt"] == prompt
    assert all(one["kind"] == "video" and one["frame_times"][:2] in ([0, 0.5], [0, 1]) for one in content["media"])


def test_several_videos_stand_in_one_prompt_as_in_python(run):
    model = SpecVLM.from_pretrained(TARGET, max_new_tokens=4)
    wanted = model.generate(["a.mp4", "b.mp4"], "Compare.")
    assert answer(run, "a.mp4", "b.mp4", "-p", "Compare.")["token_ids"] == list(wanted.token_ids)
    assert wanted.usage.visual_tokens == 2 * model.generate("a.mp4", "Compare.").usage.visual_tokens


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["describe", "a.mp4", "film"], "'film' may be a video, since it exists, or the question: .* with -p"),
        (["describe", "a.mp4", "c.mp4"], "'c.mp4' does not exist"),
        (["describe", "a.mp4", "What", "happens?"], "'What' is no video that exists, .* quote the question .*-p"),
        (["describe", "-", "-", "-p", "x"], "'-' is stdin, which holds one file"),
        (["inspect", "a.mp4", "b.mp4", "-o", "x.png"], "2 videos cannot be drawn at once"),
        (["describe", "a.mp4", "--keepratio", "1", "b.mp4"], "unknown argument '--keepratio'"),
        (["describe", "a.mp4", "--max-new-tokens", "9" * 5000], r"--max-new-tokens"),
        (["describe", "a.mp4", "--keep-ratio", "9" * 5000], r"--keep-ratio|keep_ratio"),
        (["describe", "a.mp4", "--device", "meta", *MODEL], "device='meta'"),
        (["describe", "a\0.mp4"], "does not exist"),
        (["describe", " "], "' ' does not exist"),
        (["describe", ""], "'' does not exist"),
        (["describe", "a.mp4", "<|video_pad|>", *MODEL], r"the text holds '<\|video_pad\|>'"),
        (["verify", "a.mp4", "-p", "<|image_pad|>", *PAIR], r"the text holds '<\|image_pad\|>'"),
        (["describe", "a.mp4", "--load", "no.py"], "no.py cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_2(run, argv, says):
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert len(err) < 1000
    assert re.search(says, err)


# What fits


def test_a_video_that_is_too_long_is_thinned_with_the_numbers(run):
    usage = answer(run, "a.mp4")["usage"]
    asked = ["--max-new-tokens", 4096 - usage["prompt_tokens"] + usage["visual_tokens"] // 4, "--stop", "e", "--json"]
    code, out, err = run("describe", "a.mp4", "--fps", "2", *MODEL, *asked)
    found = json.loads(out)["media"][0]["frame_times"]
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("specvlm: warning: ")
    assert f"exceed the context of 4096 tokens: the model sees {len(found)} of 4704 in place of 8 frames" in err
    assert f"--num-frames {len(found)}" in err
    assert "--fit error" in err
    assert len(found) == 6
    again = run("describe", "a.mp4", "--num-frames", len(found), *MODEL, *asked)
    assert (again[0], again[2]) == (0, "")


def suggested(err, option):
    return err.split(f"{option} ")[1].split()[0].rstrip(").,")


@pytest.mark.parametrize("option", ["--num-frames", "--max-new-tokens"])
def test_a_refusal_names_options_and_a_value_that_fits(run, option):
    usage = answer(run, "a.mp4")["usage"]
    asked = str(4096 - usage["prompt_tokens"] + usage["visual_tokens"] // 2)
    argv = ["describe", "a.mp4", *MODEL, "--fit", "error"]
    code, out, err = run(*argv, "--max-new-tokens", asked)
    assert (code, out, err.count("\n")) == (2, "", 1)
    least = {"--max-new-tokens": asked} | {option: suggested(err, option)}
    assert run(*argv, *[word for pair in least.items() for word in pair], "--stop", "e")[0] == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_fits_is_found_from_shapes(family):
    """As many frames as fit, and no fewer; several videos share; Python names settings."""
    model = SpecVLM.from_pretrained(tiny.checkpoint(family))
    videos = [tiny.video(40, 100, 140), tiny.video(6, 100, 140, seed=1)]
    whole = len(model.read(model.request(videos, "Hi", max_new_tokens=1)).input_ids)
    room = 4096 - whole
    for spare in (60, whole // 2):
        with pytest.warns(FitWarning, match=r"num_frames=\d+.*fit='error'") as caught:
            fewer = model.load(videos, "Hi", max_new_tokens=room + spare)
        counts = [len(frames.pixels) for frames in fewer.loaded.media]
        told = int(suggested(str(caught[0].message).replace("=", " "), "num_frames"))
        assert counts == [told, min(6, told)]
        assert len(model.read(fewer).input_ids) + room + spare <= 4096
        with pytest.raises(CapacityError, match=rf"num_frames={told} would fit"):
            model.load(videos, "Hi", max_new_tokens=room + spare, fit="error")
        model.load(videos, "Hi", max_new_tokens=room + spare, fit="error", num_frames=told)


def test_frames_become_smaller_where_few_are_left():
    model = SpecVLM.from_pretrained(TARGET)
    text = len(model.read(model.request(tiny.video(4, 28, 28), "Hi", max_new_tokens=1)).input_ids)
    with pytest.warns(FitWarning, match=r"4 of 3136 in place of 8 frames of 7056 pixels.*num_frames=4 max_pixels=3136"):
        found = model.load(tiny.video(8, 90, 90), "Hi", max_new_tokens=4096 - text - 6)
    assert len(found.loaded.media[0].pixels) == 4
    content = [{"type": "image", "image": np.zeros((90, 90, 3), np.uint8)}, {"type": "text", "text": "Hi"}]
    picture = [{"role": "user", "content": content}]
    most = 4096 - len(model.read(model.request(picture)).input_ids)
    with pytest.raises(CapacityError, match=rf"\(max_pixels=3136 would fit\), or .*max_new_tokens={most} would fit"):
        model.load(picture, max_new_tokens=most + 5)
    model.load(picture, max_new_tokens=most + 5, max_pixels=3136)
    with pytest.raises(CapacityError, match=r"shorten the text by \d+ tokens or more"):
        model.load(None, "ball " * 5000)


def test_memory_names_settings_in_python_and_options_here():
    from specvlm.core.errors import memory_errors

    with pytest.raises(CapacityError, match=r"fewer frames \(num_frames, fps\)") as caught, memory_errors():
        raise MemoryError
    assert "fewer frames (--num-frames, --fps)" in caught.value.on_command_line()


# Comparing and proving


def test_compare_tells_of_the_tokens_that_were_asked_for(run):
    code, _, err = run("compare", "a.mp4", *PAIR, "--max-new-tokens", "5000")
    assert code == 2
    assert "5000 new ones" in err


def test_verify_tells_a_file_that_cannot_be_read_from_a_difference(run, monkeypatch):
    (bad := media.Path("bad.mp4")).write_bytes(b"no film")
    try:
        code, out, err = run("verify", "a.mp4", "bad.mp4", *PAIR, *SHORT)
        assert (code, err) == (2, "")
        assert "bad.mp4: not answered" in out
        assert out.splitlines()[-1] == "lossless (float32): yes, 1 of 2 questions, 1 not answered"
        code, out, _ = run("verify", "bad.mp4", *PAIR, *SHORT, "--json")
        assert code == 2
        assert (json.loads(out)["lossless"], json.loads(out)["not_answered"]) == (None, 1)
        monkeypatch.setattr("specvlm.check.lossless.Proof.is_lossless", False)
        assert run("verify", "a.mp4", "bad.mp4", *PAIR, *SHORT)[0] == 1
    finally:
        bad.unlink()


def test_json_holds_decisions_only_on_demand(run):
    assert "decisions" not in answer(run, "a.mp4")["speculation"]
    assert len(answer(run, "a.mp4", "--explain")["speculation"]["decisions"]) == 3


# Pruners and drafters of one's own


OWN = """
from specvlm import pruner
from specvlm.speculate.drafters import Drafter, drafter
from specvlm.speculate.accept import Draft

@pruner("newest", scored=False)
def newest(scores, grid, count):
    return grid[:, 0].argsort(descending=True)[:count]

@drafter("again")
class Again(Drafter):
    def propose(self, token, topology):
        return Draft.of([token], [-1]) if len(topology) else Draft.empty()
"""


@pytest.mark.parametrize("command", ["describe", "compare", "inspect", "verify"])
def test_every_command_takes_them(run, command, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    more = ["-o", tmp_path / "x.png"] if command == "inspect" else [*PAIR[2:], *SHORT]
    try:
        code, _, err = run(command, "a.mp4", *MODEL, "--load", tmp_path / "own.py", "--pruner", "newest", *more)
        assert (code, err) == (0, "")
        if command == "describe":
            code, _, err = run(command, "a.mp4", *MODEL, "--load", tmp_path / "own.py", "--drafter", "again", *SHORT)
            assert (code, err) == (0, "")
    finally:
        PRUNERS.pop("newest", None)
        DRAFTERS.pop("again", None)


# Settings in vain


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--refresh", "4"], {"refresh": "drafter 'self'"}),
        (["--no-draft", "--lookup-tokens", "4"], {"lookup_tokens": "nothing is drafted"}),
        (["--no-draft", "--tree", "paper", "--keep-ratio", "0.2"], {"tree": "nothing", "keep_ratio": "nothing"}),
        (["--drafter", "lookup", "--keep-tokens", "4"], {"keep_tokens": "drafter 'lookup' prunes nothing"}),
        (["--keep-ratio", "0.2", "--keep-tokens", "4"], {"keep_ratio": "keep_tokens says"}),
        (["--seed", "3", "--top-p", "0.5"], {"seed": "temperature is 0", "top_p": "temperature is 0"}),
        (["--pruner", "uniform", "--mass", "0.3"], {"mass": "pruner 'uniform'"}),
        (["--pruner", "uniform", "--score-rows", "last"], {"score_rows": "reads no scores"}),
        (["--pruner", "none", "--keep-ratio", "0.3"], {"keep_ratio": "'none' keeps all"}),
        (["--num-frames", "4", "--max-frames", "2"], {"max_frames": "num_frames"}),
        (["--keep-ratio", "0.2", "--seed", "3", "--temperature", "1"], {}),
    ],
)
def test_settings_without_effect_are_told_by_name(run, options, told):
    models = MODEL if {"--no-draft", "--drafter"} & set(options) else PAIR
    code, _, err = run("describe", "a.mp4", *models, *options, *SHORT)
    assert code == 0
    assert err.count("\n") == len(told)
    for name, reason in told.items():
        assert f"specvlm: warning: {name} has no effect: " in err
        assert reason in err


def test_settings_of_another_drafter_are_told_in_python_too():
    model = SpecVLM.from_pretrained(TARGET, max_new_tokens=2)
    with pytest.warns(SettingWarning, match="refresh has no effect: nothing is drafted"):
        model.generate(None, "Hi", refresh=3)


# Terminals


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_text_can_be_written(monkeypatch, encoding, folder):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    chunk = Chunk("caf\u00e9 \u4e2d \udcff", (1,), "length")
    monkeypatch.setattr("specvlm.engine.text.TextStream.add", lambda *_: chunk)
    assert cli.main(["describe", "a.mp4", *MODEL, "--max-new-tokens", "1"]) == 0
    text = raw.getvalue().decode(encoding)
    assert text == {
        "ascii": "caf\\xe9 \\u4e2d \\udcff\n",
        "utf-8": "caf\u00e9 \u4e2d \\udcff\n",
    }.get(encoding, "caf\u00e9 \\u4e2d \\udcff\n")


def test_closed_streams_are_one_line_or_silence(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert cli.main(["describe", "a.mp4"]) == 2
    assert capsys.readouterr().err.startswith("specvlm: stdout is closed: ")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        assert cli.main(["describe", "-"]) == 2
    assert capsys.readouterr().err.startswith("specvlm: stdin is closed: ")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert cli.main(["describe", "missing.mp4"]) == 2
        assert cli.main(["describe", "a.mp4", *MODEL, *SHORT, "--stats"]) == 0
        sys.stderr.close()


class Broken(io.StringIO):
    """A stream that cannot be written."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_full_stderr_ends_no_answer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Broken())
    assert cli.main(["describe", "a.mp4", *PAIR, "--refresh", "3", *SHORT]) == 0
    assert capsys.readouterr().out
    assert cli.main(["describe", "missing.mp4"]) == 2


def test_a_full_stdout_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken())
    assert cli.main(["describe", "a.mp4", *MODEL, *SHORT]) == 2
    assert capsys.readouterr().err == "specvlm: no space left on the device: free some, or write elsewhere\n"


@pytest.mark.parametrize("moment", [0.0, 0.3])
def test_an_interrupt_at_the_start_is_one_line(moment):
    slow = "c.main = lambda: print(1, flush=True) or time.sleep(9)"
    script = f"import time, specvlm.__main__ as m, specvlm.cli.main as c\n{slow}\nm.run()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, b"specvlm: interrupted\n")


def test_a_request_to_end_leaves_nothing_behind(monkeypatch, capsys):
    """It passes through every `finally` on the way."""
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def generate_request(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            ended.append(True)

    monkeypatch.setattr(SpecVLM, "generate_request", generate_request)
    try:
        assert cli.main(["describe", "a.mp4", *MODEL]) == 128 + signal.SIGTERM
    finally:
        assert signal.getsignal(signal.SIGTERM) is before
    assert (ended, capsys.readouterr()) == ([True], ("", ""))


def test_ignored_signals_stay_ignored(monkeypatch):
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in old:
            signal.signal(number, signal.SIG_IGN)
        console.raise_on_signals()
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in old)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
