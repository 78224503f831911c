"""The command line on tiny random pairs, and once on the bundled one."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace

import media
import numpy as np
import pytest
import tiny
from PIL import Image

from specvlm import EngineConfig, SpecVLM, prune
from specvlm.check import inspect as inspection
from specvlm.cli import main as cli
from specvlm.engine.pair import bundled
from specvlm.engine.sources import DEFAULT_PROMPT
from specvlm.speculate import drafters

TARGET = tiny.checkpoint("qwen2_5_vl", "target")
PAIR = ("--target", TARGET, "--draft", tiny.checkpoint("qwen2_5_vl", "near"))
SHORT = ("--max-new-tokens", "12")
SETTINGS = {  # another value than the default for every setting, as it is written and as it arrives
    "num_frames": ("5", 5), "fps": ("1.5", 1.5), "start": ("1", 1.0), "end": ("9", 9.0), "max_frames": ("7", 7),
    "max_pixels": ("9000", 9000), "min_frames": ("3", 3), "min_pixels": ("900", 900), "fit": ("error", "error"),
    "resized_height": ("56", 56), "resized_width": ("56", 56), 
    "total_pixels": ("90000", 90000), "max_download_bytes": ("99", 99),
    "timeout": ("3", 3.0), "keep_ratio": ("0.2", 0.2), "keep_tokens": ("8", 8), "pruner": ("window", "window"),
    "mass": ("0.5", 0.5), "spacing": ("sequence", "sequence"), "window": ("back", "back"), "per_visual": (None, True),
    "focus": ("0.25", 0.25),
    "score_rows": ("last_turn", "last_turn"), "score_layers": ("0,1", "0,1"), "positions": ("repacked", "repacked"),
    "text_positions": ("qwen", "qwen"),
    "prune_seed": ("3", 3), "drafter": ("none", "none"),
    "policy": ("fixed", "fixed"), "lookup_tokens": ("4", 4), "refresh": ("8", 8),
    "tree": ("0,1,00", "0,1,00"), "max_new_tokens": ("9", 9), "temperature": ("0.7", 0.7), "top_p": ("0.9", 0.9),
    "top_k": ("20", 20), "min_p": ("0.1", 0.1), "repetition_penalty": ("1.1", 1.1), "seed": ("4", 4),
    "stop": ("END", ("END",)), "ignore_eos": (None, True), "eager": (None, True),
}  # fmt: skip
KEYS = {
    "": {"prompt", "media", "text", "token_ids", "finish_reason", "usage", "speculation", "seconds",
         "peak_memory_bytes", "config", "versions"},
    "usage": {"prompt_tokens", "visual_tokens", "kept_visual_tokens", "completion_tokens"},
    "speculation": {"rounds", "target_passes", "drafted_tokens", "accepted_tokens", "mean_accepted_length",
                    "acceptance_length", "accepted_per_depth"},
    "seconds": {"read", "encode", "prefill", "prune", "draft_prefill", "calibrate", "capture", "decode",
                "time_to_first_token", "total"},
    "config": {"models", "video", "prune", "draft", "sampling", "run"},
    "versions": {"python", "specvlm", "torch", "transformers", "av"},
}  # fmt: skip


def config_fields(*parts):
    return [setting for part in parts or cli.PARTS for setting in fields(cli.PARTS[part])]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Eight frames of saturated colours, four seconds."""
    images = [np.full((64, 96, 3), (210, 40 + 8 * number, 20), np.uint8) for number in range(8)]
    return str(media.make_video(tmp_path_factory.mktemp("cli") / "clip.mp4", 8, rate=2, images=images))


class Terminal(io.StringIO):
    """Remembers what was written and when it was flushed."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def isatty(self):
        return True

    def flush(self):
        self.flushed.append(self.getvalue())


# describe


def test_the_answer_goes_to_stdout_and_nothing_to_stderr(run, clip):
    wanted = SpecVLM.from_pretrained(TARGET).generate(clip, "What happens?", max_new_tokens=12)
    assert wanted.text
    assert run("describe", clip, "What happens?", *PAIR, *SHORT) == (0, wanted.text + "\n", "")


def test_json_is_one_object_with_exactly_these_keys(run, clip):
    code, out, err = run("describe", clip, *PAIR, *SHORT, "--tree", "paper", "--json")
    content = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    for part, keys in KEYS.items():
        assert set(content[part] if part else content) == keys
    for part, config in cli.PARTS.items():
        assert set(content["config"][part]) == {setting.name for setting in fields(config)}
    models = {"target": TARGET, "draft": PAIR[3], "device": "cpu", "draft_device": "cpu", "draft_quant": None,
              "dtype": "float32"}  # fmt: skip
    assert content["config"]["models"] == models
    assert len(content["token_ids"]) == content["usage"]["completion_tokens"] == 12
    assert content["usage"]["kept_visual_tokens"] == max(1, round(0.1 * content["usage"]["visual_tokens"]))


def test_text_streams_as_it_is_verified(monkeypatch, clip):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    fixed = "paper"  # a chosen tree depends on the clock, and so would the chunks
    assert cli.main(["describe", clip, *PAIR, "--max-new-tokens", "40", "--tree", fixed]) == 0
    chunks = list(SpecVLM.from_pretrained(PAIR[1], draft=PAIR[3]).stream(clip, max_new_tokens=40, tree=fixed))
    seen = [text for before, text in zip(["", *out.flushed], out.flushed, strict=False) if text != before]
    pieces = [chunk.text for chunk in chunks if chunk.text]
    assert len(pieces) > 3
    assert seen == ["".join(pieces[:count]) for count in range(1, len(pieces) + 1)] + ["".join(pieces) + "\n"]


def test_plain_decoding_gives_the_same_ids_in_more_passes(run, clip):
    speculative, plain = (
        json.loads(run("describe", clip, *options, *SHORT, "--json")[1])
        for options in ((*PAIR, "--tree", "paper"), ("--target", TARGET, "--no-draft"))
    )
    assert plain["token_ids"] == speculative["token_ids"]
    assert plain["config"]["draft"]["drafter"] == "none"
    assert plain["speculation"]["rounds"] == plain["speculation"]["drafted_tokens"] == 0
    assert plain["speculation"]["target_passes"] == 12 > speculative["speculation"]["target_passes"]


def test_no_draft_loads_no_draft(run, clip, monkeypatch):
    loaded = []
    monkeypatch.setattr(SpecVLM, "from_pretrained", lambda watch, **options: loaded.append(options) or 1 / 0)
    for options in (["--no-draft"], ["--drafter", "none"]):
        with pytest.raises(ZeroDivisionError):
            run("describe", clip, *options)
    assert loaded == [{"drafter": "none"}] * 2


def test_stats_go_to_stderr(run, clip):
    code, out, err = run("describe", clip, *PAIR, *SHORT, "--stats", "--json")
    usage, speculation = json.loads(out)["usage"], json.loads(out)["speculation"]
    assert code == 0
    assert f"prompt    {usage['prompt_tokens']} tokens, {usage['visual_tokens']} of them visual" in err
    assert f"answer    12 tokens in {speculation['target_passes']} target passes; ended by length" in err
    assert f"accepted  {speculation['mean_accepted_length']:.2f} a round" in err


def test_a_file_on_stdin(run, clip, monkeypatch):
    with open(clip, "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    assert run("describe", "-", *PAIR, *SHORT) == run("describe", clip, *PAIR, *SHORT)


def test_progress_is_shown_on_a_terminal_and_gone_before_the_text(clip, monkeypatch):
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert cli.main(["describe", clip, *PAIR, *SHORT]) == 0
    shown = both.getvalue().split("\r")
    steps = [line.strip() for line in shown if line.strip().endswith("...")]
    assert [step.split()[0] for step in steps] == ["loading", "loading", "loading", "reading", "encoding", "prefilling"]
    text = SpecVLM.from_pretrained(TARGET).generate(clip, max_new_tokens=12).text
    assert both.getvalue().endswith(f" \r{text}\n")


def test_quiet_shows_no_progress(clip, monkeypatch, capsys):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["describe", clip, *PAIR, *SHORT, "--quiet"]) == 0
    assert err.getvalue() == ""


def test_defaults_run_the_bundled_pair_without_a_word_on_stderr(tmp_path):
    command = [sys.executable, "-m", "specvlm", "describe", bundled("clips") + "/example.mp4", "--json"]
    done = subprocess.run(
        [*command, "--num-frames", "2", "--max-new-tokens", "4"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert content["config"].pop("models")["draft"] == bundled("draft")
    wanted = EngineConfig().replace(num_frames=2, max_new_tokens=4, repetition_penalty=1.0)
    assert content["config"] == json.loads(json.dumps(asdict(wanted)))
    assert content["usage"]["completion_tokens"] == 4
    assert list(tmp_path.iterdir()) == []


# Options and help


@pytest.mark.parametrize("name", [setting.name for setting in config_fields()])
def test_every_setting_is_an_option(name):
    written, wanted = SETTINGS[name]
    option = f"--{name.replace('_', '-')}"
    argv = ["describe", "x.mp4", option, *([] if written is None else [written])]
    assert wanted != next(setting.default for setting in config_fields() if setting.name == name)
    other = {"resized_height": "resized_width", "resized_width": "resized_height"}.get(name)  # they go together
    more = [] if other is None else [f"--{other.replace('_', '-')}", "84"]
    assert cli._parse([*argv, *more]).settings == {name: wanted} | ({other: 84} if other else {})


def test_stop_may_be_repeated():
    assert cli._parse(["describe", "x", "--stop", "a", "--stop", "b"]).settings == {"stop": ("a", "b")}


@pytest.mark.parametrize(
    ("command", "parts"),
    [("describe", ()), ("compare", ()), ("inspect", ("video", "prune"))],
)
def test_help_names_every_setting_and_its_default(command, parts, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for setting in config_fields(*parts):
        assert f" --{setting.name.replace('_', '-')} " in text
        assert " ".join(setting.metadata["help"].split()) in text
    assert "[default: 0.1]" in text
    assert "%%" not in text
    for name in [*prune.PRUNERS, *(drafters.DRAFTERS if "draft" in parts or not parts else ())]:
        assert name in text


@pytest.mark.parametrize("command", ["describe", "verify"])
def test_words_may_stand_behind_options_also_those_that_look_like_options(command):
    assert cli._parse([command, "a.mp4", "--fps", "1", "b.mp4"]).words == ["a.mp4", "b.mp4"]
    assert cli._parse([command, "a.mp4", "--fps", "1", "--", "-b.mp4"]).words == ["a.mp4", "-b.mp4"]


def test_help_and_bad_options_import_no_torch():
    script = (
        "import sys; from specvlm.cli.main import main\n"
        "assert main(['describe', 'x', '--keep-ratio', '2']) == main(['describe', 'no.mp4']) == 2\n"
        "try: main(['describe', '--help'])\n"
        "finally: assert not {'torch', 'transformers', 'av'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (0, 2)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "specvlm 0.1.0\n"


# compare


def test_compare_finds_the_answers_identical(run, clip):
    code, out, err = run("compare", clip, *PAIR, *SHORT, "--tree", "paper")
    lines = out.splitlines()
    assert (code, err, lines[-1]) == (0, "", "identical: yes")
    assert lines[0].split() == ["plain", "speculative"]
    table = {line[:22].strip(): line[22:].split() for line in lines[1:8]}
    assert table["tokens"] == ["12", "12"]
    plain, speculative = map(int, table["target passes"])
    assert plain == 12 > speculative
    assert table["MAT"][0] == "-"
    assert float(table["acceptance length"][1]) == pytest.approx(1 + float(table["MAT"][1]))
    assert {"ms a token", "time to first token, s", "total, s"} < set(table)
    assert lines[-2].startswith("speedup: ")


def test_compare_draws_one_seed_for_both(run, clip):
    code, out, _ = run("compare", clip, *PAIR, *SHORT, "--temperature", "1", "--json")
    found = json.loads(out)
    seeds = {found[name]["config"]["sampling"]["seed"] for name in ("plain", "speculative")}
    assert (code, found["identical"], len(seeds)) == (0, True, 1)
    assert None not in seeds


def test_compare_as_json(run, clip):
    content = json.loads(run("compare", clip, *PAIR, *SHORT, "--json")[1])
    assert set(content) == {"plain", "speculative", "ms_a_token", "speedup", "identical", "first_difference"}
    assert set(content["plain"]) == set(content["speculative"]) == KEYS[""]
    assert (content["identical"], content["first_difference"]) == (True, None)
    plain = content["plain"]["seconds"]
    assert content["ms_a_token"]["plain"] == pytest.approx(1000 * (plain["total"] - plain["time_to_first_token"]) / 11)
    assert content["speedup"]["total"] == pytest.approx(plain["total"] / content["speculative"]["seconds"]["total"])


@pytest.mark.parametrize("options", [(), ("--temperature", "1")])
def test_compare_says_where_the_answers_part(run, clip, monkeypatch, options):
    real = SpecVLM.generate_request

    def wrong(self, request):
        found = real(self, request)
        same = (1, 2, 3)
        return replace(found, token_ids=(*same, 40) if request.config.draft.drafter == "none" else (*same, 41, 42))

    monkeypatch.setattr(SpecVLM, "generate_request", wrong)
    code, out, _ = run("compare", clip, *PAIR, *SHORT, *options)
    assert code == 1
    verdict = out.splitlines()[-1]
    assert verdict.startswith("identical: no, first at token 3: plain ")
    assert "(40), speculative " in verdict


def test_compare_sees_a_text_that_ends_early():
    from specvlm.check.compare import first_difference

    class Model:
        class target:
            class tokenizer:
                decode = staticmethod(str)

    found = first_difference((1, 2, 3), (1, 2), Model)
    assert (found.index, found.plain, found.speculative, found.speculative_text) == (2, 3, None, "the end")
    assert first_difference((1, 2), (1, 2), Model) is None


# inspect


@pytest.mark.parametrize("options", [("--keep-ratio", "0.3"), ("--pruner", "uniform", "--keep-tokens", "5")])
def test_inspect_lights_the_kept_cells(run, clip, tmp_path, options):
    path = tmp_path / "kept.png"
    code, out, err = run("inspect", clip, "-o", path, "--target", TARGET, "--json", *options)
    content = json.loads(out)
    assert (code, err) == (0, "")
    settings = {"keep_ratio": 0.3} if len(options) == 2 else {"pruner": "uniform", "keep_tokens": 5}
    pair = SpecVLM.from_pretrained(TARGET, draft=PAIR[3], max_new_tokens=4, **settings)
    request = pair.request(clip, tree="chain:2")  # which is drafted, however short the answer
    pair.generate_request(request)
    assert content["keep"] == request.keep.tolist()
    assert (content["video"], content["prompt"]) == ("clip.mp4", DEFAULT_PROMPT)
    assert content["seconds"] == [number / 2 for number in range(8)]
    steps, rows, columns = content["grid"].values()
    assert content["visual_tokens"] == steps * rows * columns == request.usage.visual_tokens
    assert _lit_cells(path, steps, rows, columns) == set(content["keep"])
    assert os.listdir(tmp_path) == ["kept.png"]


def _lit_cells(path, steps, rows, columns):
    """Return the cells of the frames whose middle is coloured: the others are grey."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    layout = inspection.lay_out(steps, rows, columns)
    left = (picture.shape[1] - layout.width) // 2
    top = picture.shape[0] - layout.height - inspection.MARGIN + inspection.LINE
    cell = layout.cell
    lit = set()
    for index in range(steps * rows * columns):
        step, row, column = np.unravel_index(index, (steps, rows, columns))
        x, y = layout.corner(step)
        red, _, blue = picture[top + y + row * cell + cell // 2, left + x + column * cell + cell // 2]
        if red - blue > 100:
            lit.add(int(index))
    return lit


def test_inspect_says_in_one_line_what_it_did(run, clip, tmp_path):
    path = tmp_path / "a.png"
    code, out, err = run("inspect", clip, "-o", path, "--target", TARGET)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith(f"{path}: verifier keeps ")


def test_inspect_leaves_no_half_picture(run, clip, tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    code, out, err = run("inspect", clip, "-o", tmp_path / "a.png", "--target", TARGET)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a.png" in err
    assert "No space left on device" in err
    assert os.listdir(tmp_path) == []
