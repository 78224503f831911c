"""The quality bench: what it runs and counts, how it goes on after a kill, and what it says of answers that differ."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import media
import pytest
import tiny
import torch
from conftest import load

from specvlm import ConfigError, SpecVLM, prune
from specvlm.check import reference
from specvlm.cli import main as cli
from specvlm.core.errors import CapacityError
from specvlm.engine import account
from specvlm_bench import journal, methods, quality
from specvlm_bench.data import Data, Problem, Sample
from specvlm_bench.journal import Journal

LENGTH = 24
TIMES = ("seconds", "ms_per_token", "peak_memory_bytes")
FIXED = ("plain", "generate", "chain", "tree", "verifier", "uniform", "self")  # what no clock has a say in


@pytest.fixture
def pair():
    return SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))


def samples(count=4):
    """Return questions about half as many videos."""
    return Data(
        "tiny",
        tuple(
            Sample(f"sample {i}", tiny.video(6, seed=i // 2), f"What happens, {i}?", f"video {i // 2}")
            for i in range(count)
        ),
        (Problem("tiny.jsonl, line 9", "no video"),),
    )


def protocol(*names, **changes):
    fields = {"settings": {"max_new_tokens": LENGTH}, "num_overlays": 0} | changes
    return quality.Protocol(methods.named(names or FIXED, [0.2]), **fields)


def ran(pair, data, plan, folder, watch=lambda text: None):
    quality.check(pair, plan)
    with Journal(folder, quality.origin(pair, data, plan)) as open_journal:
        quality.run(pair, data, plan, open_journal, watch)
    return journal.read(folder)


def counts(run):
    """Return the answers without what a clock measured."""
    return {key: {name: line[name] for name in line.keys() - {*TIMES}} for key, line in run.answers.items()}


def test_every_method_answers_every_sample_and_is_counted_alike(pair, tmp_path):
    data = samples()
    run = ran(pair, data, protocol(), tmp_path)
    assert run.of_kind("problem") == [{"kind": "problem", "where": "tiny.jsonl, line 9", "text": "no video"}]
    assert not run.of_kind("failure")
    assert not run.of_kind("difference")
    assert len(run.of_kind("answer")) == len(run.answers) == len(data.samples) * len(FIXED)
    for (sample, method), line in run.answers.items():
        ids = pair.generate(*source(data, sample), drafter="none", max_new_tokens=LENGTH).token_ids
        assert line["token_ids"] == list(ids), (sample, method)
        assert line["video"] == f"video {int(sample[-1]) // 2}"
        assert line["new_tokens_with_eos"] == len(ids) == sum(line["tokens_per_pass"])
        assert line["new_tokens"] == len(ids) - (ids[-1] in pair.target.eos_ids)
        assert line["target_passes"] == len(line["tokens_per_pass"]) == len(line["drafted_per_pass"])
        assert line["rounds"] == sum(drafted > 0 for drafted in line["drafted_per_pass"])
        assert line["accepted_tokens"] == sum(line["accepted_per_depth"])
        assert 0 < line["seconds"]["time_to_first_token"] < line["seconds"]["total"]
        later = line["seconds"]["total"] - line["seconds"]["time_to_first_token"]
        assert line["ms_per_token"] == pytest.approx(1e3 * later / (len(ids) - 1))
        assert line["peak_memory_bytes"] > 1 << 20
    places = {sample.id: [run.answers[sample.id, name]["place"] for name in FIXED[:4]] for sample in data.samples}
    assert len(set(map(tuple, places.values()))) > 1  # seeded: always the same orders
    passes = {name: [run.answers[sample.id, name]["target_passes"] for sample in data.samples] for name in FIXED[:4]}
    assert passes["plain"] == passes["generate"]
    assert all(few < many for few, many in zip(passes["tree"], passes["plain"], strict=True))


def source(data, sample_id):
    [sample] = [sample for sample in data.samples if sample.id == sample_id]
    return sample.video, sample.prompt


def test_what_comes_once_is_no_time_of_a_token(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(quality._Runner, "warm_up", lambda *args: None)
    run = ran(pair, samples(1), protocol("plain", "auto"), tmp_path)
    line = run.answers["sample 0", "auto"]
    seconds = line["seconds"]
    later = seconds["total"] - seconds["time_to_first_token"] - seconds["calibrate"] - seconds["capture"]
    assert line["ms_per_token"] == pytest.approx(1e3 * later / (line["new_tokens_with_eos"] - 1))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak cannot be begun anew")
def test_a_peak_is_that_of_one_answer():
    cpu = torch.device("cpu")
    account.reset_peak(cpu)
    large = bytearray(400 << 20)
    before = account.measure_peak(cpu)
    del large
    account.reset_peak(cpu)
    assert account.measure_peak(cpu) < before - (300 << 20)


def test_an_end_of_sequence_token_is_counted_once_and_apart(pair, tmp_path, monkeypatch):
    ids = pair.generate(*source(samples(), "sample 0"), drafter="none", max_new_tokens=LENGTH).token_ids
    monkeypatch.setattr(pair.target, "eos_ids", frozenset([ids[9]]))
    run = ran(pair, samples(1), protocol("plain", "tree"), tmp_path)
    for line in run.answers.values():
        assert (line["new_tokens"], line["new_tokens_with_eos"], line["finish_reason"]) == (9, 10, "stop")


def test_one_prefill_for_all_methods_gives_the_same_counts(pair, tmp_path):
    timed = ran(pair, samples(2), protocol(), tmp_path / "timed")
    plan = protocol(is_timed=False)
    prefills, prefill = [], SpecVLM.prefill
    pair.prefill = lambda *args, **kwargs: prefills.append(args) or prefill(pair, *args, **kwargs)
    shared = ran(pair, samples(2), plan, tmp_path / "untimed")
    assert len(prefills) == 2  # one a sample
    assert counts(shared) == counts(timed)
    assert all(line[name] is None for line in shared.answers.values() for name in TIMES)


def test_methods_that_score_otherwise_share_no_prefill(pair, tmp_path):
    plan = protocol("plain", "attention", is_timed=False)
    rows = {"drafter": "model", "policy": "fixed", "tree": "paper", "pruner": "attention", "keep_ratio": 0.2}
    others = {"last row": rows | {"score_rows": "last"}, "first layer": rows | {"score_layers": "0"}}
    plan = quality.Protocol({**plan.methods, **others}, plan.settings, is_timed=False, num_overlays=0)
    shared, timed = (
        ran(pair, samples(2), quality.Protocol(plan.methods, plan.settings, 0, is_timed, 0), tmp_path / str(is_timed))
        for is_timed in (False, True)
    )
    assert counts(shared) == counts(timed)


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("after", [11, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 1, 5))])
def test_a_killed_run_goes_on_without_loss_or_repeat(pair, tmp_path, after):
    data, plan = samples(2), protocol()
    whole = ran(pair, data, plan, tmp_path / "whole")

    def watch(text):
        if text.startswith(f"{after} of"):
            raise Stop

    with pytest.raises(Stop):
        ran(pair, data, plan, tmp_path / "killed", watch)
    file = tmp_path / "killed" / journal.NAME
    written = file.read_text()
    assert written.count('"kind": "answer"') == after
    torn = json.dumps(whole.lines[-1])
    file.write_text(written + torn[: random.Random(after).randrange(1, len(torn))])
    again = ran(pair, data, plan, tmp_path / "killed")
    assert file.read_text().startswith(written)  # what was there stays as it was
    assert len(again.of_kind("answer")) == len(again.answers)
    assert counts(again) == counts(whole)
    assert [line["kind"] for line in again.lines].count("run") == 1  # beside the first line's
    assert again.of_kind("problem") == whole.of_kind("problem")
    before = file.read_text()
    ran(pair, data, plan, tmp_path / "killed")
    assert [json.loads(line)["kind"] for line in file.read_text()[len(before) :].splitlines()] == ["run"]


def test_a_run_that_is_killed_at_any_moment_gives_the_same_table(tmp_path):
    """The whole command, killed by the system, on bundled clips."""
    names = "plain,verifier"
    command = [sys.executable, "-m", "specvlm", "bench", "quality", "--limit", "2", "--methods", names, "--untimed"]
    command += ["--no-report", "--overlays", "1", "--max-new-tokens", "32", "--quiet", "--device", "cpu", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    file = tmp_path / "killed" / journal.NAME
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count('"kind": "answer"')) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = file.read_text().count('"kind": "answer"')
    assert 0 < before < 4
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment)
    whole, killed = journal.read(tmp_path / "whole"), journal.read(tmp_path / "killed")
    assert len(killed.of_kind("answer")) == 4
    assert counts(killed) == counts(whole)
    drawn = {(line["sample"], line["method"]) for line in killed.of_kind("overlay")}
    assert drawn == {("clip00", "verifier@0.1")}
    assert (tmp_path / "killed" / "overlays" / "clip00--verifier@0.1.png").read_bytes()[:4] == b"\x89PNG"


def test_an_answer_that_fails_stops_nothing(pair, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    data = Data("x", (Sample("bad", str(bad), "What?", "bad"), *samples(1).samples), ())
    run = ran(pair, data, protocol("plain", "tree"), tmp_path)
    failures = run.of_kind("failure")
    assert {(line["sample"], line["method"]) for line in failures} == {("bad", "plain"), ("bad", "tree")}
    assert all("bad.mp4" in line["text"] and "\n" not in line["text"] for line in failures)
    assert set(run.answers) == {("sample 0", "plain"), ("sample 0", "tree")}
    again = ran(pair, data, protocol("plain", "tree"), tmp_path)
    assert again.of_kind("failure") == 2 * failures  # what failed is tried again
    assert again.answers == run.answers


def test_a_lack_of_memory_fails_one_answer(pair, tmp_path, monkeypatch):
    usual = SpecVLM.generate_request

    def generate_request(self, request, *args, **kwargs):
        if request.config.draft.tree == "chain:5":
            raise MemoryError
        return usual(self, request, *args, **kwargs)

    monkeypatch.setattr(SpecVLM, "generate_request", generate_request)
    run = ran(pair, samples(1), protocol("plain", "chain", is_timed=False), tmp_path)
    [failure] = run.of_kind("failure")
    assert failure["method"] == "chain"
    assert failure["text"].startswith("out of memory on this machine")
    assert len(run.answers) == 1


def test_where_an_answer_differs_its_place_and_gap_are_noted(pair, tmp_path, monkeypatch):
    usual = SpecVLM.generate_request
    wrong = 7

    def generate_request(self, request, *args, **kwargs):
        found = usual(self, request, *args, **kwargs)
        if request.config.draft.tree != "chain:5":
            return found
        ids = (*found.token_ids[:5], wrong, *found.token_ids[6:])
        return replace(found, token_ids=ids)

    monkeypatch.setattr(SpecVLM, "generate_request", generate_request)
    run = ran(pair, samples(2), protocol("plain", "tree", "chain", is_timed=False), tmp_path)
    found = run.of_kind("difference")
    assert [(line["sample"], line["method"], line["index"]) for line in found] == [
        ("sample 0", "chain", 5),
        ("sample 1", "chain", 5),
    ]
    for line in found:
        request = pair.request(*source(samples(2), line["sample"]), drafter="none", max_new_tokens=LENGTH)
        passes = []
        ids = [
            token for latest in pair.decode(request, pair.prefill(request), passes.append) for token in latest.token_ids
        ]
        assert (line["plain_token"], line["other_token"]) == (ids[5], wrong)
        assert line["gap"] == pytest.approx(float(passes[5][0, ids[5]] - passes[5][0, wrong]), abs=1e-5)
        assert line["gap"] > 0


def test_what_was_kept_is_drawn_once_a_way_of_pruning(pair, tmp_path):
    plan = protocol("plain", "tree", "verifier", "uniform", "self@0.2", num_overlays=1, is_timed=False)
    run = ran(pair, samples(2), plan, tmp_path)
    drawn = {line["method"]: line for line in run.of_kind("overlay")}
    assert drawn.keys() == {"verifier@0.2", "uniform@0.2", "self@0.2"}
    assert {line["sample"] for line in drawn.values()} == {"sample 0"}
    assert drawn["self@0.2"]["file"] == drawn["verifier@0.2"]["file"] != drawn["uniform@0.2"]["file"]
    for line in drawn.values():
        assert (tmp_path / line["file"]).read_bytes()[:4] == b"\x89PNG"
        assert line["kept_visual_tokens"] == run.answers["sample 0", line["method"]]["kept_visual_tokens"]


def test_sampled_answers_have_one_seed_and_are_the_same_text(pair, tmp_path):
    settings = {"max_new_tokens": LENGTH, "temperature": 1.0}
    run = ran(pair, samples(2), protocol("plain", "tree", "verifier", settings=settings, is_timed=False), tmp_path)
    assert len(run.answers) == 6
    assert not run.of_kind("difference")
    greedy = pair.generate(*source(samples(), "sample 0"), drafter="none", max_new_tokens=LENGTH)
    assert run.answers["sample 0", "plain"]["token_ids"] != list(greedy.token_ids)


def test_a_samples_own_settings_reach_every_method(pair, tmp_path):
    file = media.make_video(tmp_path / "clip.mp4", 16, rate=2)
    data = Data("x", (Sample("part", str(file), "What?", "clip", {"start": 1.0, "end": 4.0}),), ())
    run = ran(pair, data, protocol("plain", "tree"), tmp_path)
    whole = pair.generate(str(file), "What?", drafter="none", max_new_tokens=LENGTH).usage.visual_tokens
    assert {line["visual_tokens"] for line in run.answers.values()} == {3 * whole // 8 + (3 * whole // 8) % 2}


def test_each_method_with_something_left_is_warmed_up(pair, tmp_path, monkeypatch):
    """Also behind one that always fails, and after a restart those alone that are left."""
    usual = SpecVLM.generate_request

    def generate_request(self, request, *args, **kwargs):
        if request.config.draft.tree == "chain:5":
            raise CapacityError("too large")
        return usual(self, request, *args, **kwargs)

    monkeypatch.setattr(SpecVLM, "generate_request", generate_request)
    for wanted in (["plain", *["chain"] * 3, "tree"], ["chain"] * 3):
        said = []
        ran(pair, samples(4), protocol("plain", "chain", "tree"), tmp_path, said.append)
        warmed = [text.split(": ")[1] for text in said if text.startswith("warming up")]
        assert sorted(warmed) == sorted(wanted)


def test_a_gap_that_cannot_be_had_stops_nothing(pair, tmp_path, monkeypatch):
    def refuse(*args):
        raise CapacityError("too large")

    monkeypatch.setattr(quality, "logit_gap", refuse)
    monkeypatch.setattr(reference, "generate", lambda *args, **kwargs: reference.Reference((1, 2), ((1.0, 1),) * 2, ()))
    with pytest.warns(quality.QualityWarning, match="logit gap of sample 0 is not known: too large"):
        run = ran(pair, samples(1), protocol("plain", "generate"), tmp_path)
    assert [line["gap"] for line in run.of_kind("difference")] == [None]


def test_names_of_any_kind_become_files(pair, tmp_path):
    data = Data("x", tuple(replace(samples(1).samples[0], id=name) for name in ("a/" * 200, "a/" * 201, "a b")), ())
    run = ran(pair, data, protocol("plain", "verifier", num_overlays=3, is_timed=False), tmp_path)
    assert len({line["file"] for line in run.of_kind("overlay")}) == 3


def test_an_answer_of_one_token_has_no_time_of_later_ones(pair, tmp_path):
    run = ran(pair, samples(1), protocol("plain", "generate", settings={"max_new_tokens": 1}), tmp_path)
    assert [line["ms_per_token"] for line in run.answers.values()] == [None, None]


def test_progress_tells_how_long_the_rest_takes(pair, tmp_path):
    said = []
    ran(pair, samples(2), protocol("plain", "tree"), tmp_path, said.append)
    assert said[:2] == ["warming up: plain", "warming up: tree"]
    assert [text.split(" answers")[0] for text in said[2:]] == ["0 of 4", "1 of 4", "2 of 4", "3 of 4"]
    assert all(re.search(r", about \d+ s left: sample ", text) for text in said[3:])
    assert [quality._duration(seconds) for seconds in (7, 95, 3 * 3600 + 1200)] == ["7 s", "2 min", "3 h 20 min"]


# Methods


def test_a_pruner_is_crossed_with_the_ratios_and_a_name_may_have_its_own():
    found = methods.named(["plain", "verifier", "self@0.25", "uniform@0.5"], [0.1, 0.05])
    tree = {"drafter": "model", "policy": "fixed", "tree": "paper"}
    assert found == {
        "plain": {"drafter": "none"},
        "verifier@0.1": tree | {"pruner": "verifier", "keep_ratio": 0.1},
        "verifier@0.05": tree | {"pruner": "verifier", "keep_ratio": 0.05},
        "self@0.25": tree | {"drafter": "self", "keep_ratio": 0.25},
        "uniform@0.5": tree | {"pruner": "uniform", "keep_ratio": 0.5},
    }
    assert methods.named(["tree", "chain"], [0.1], "0,1")["tree"]["tree"] == "0,1"
    assert methods.named(["chain"], [0.1], "0,1")["chain"]["tree"] == "chain:5"


def test_every_pruner_and_every_drafter_is_a_method(pair):
    known = [name for name in prune.PRUNERS if name != "none"] + ["self", "lookup", *methods.METHODS]
    plan = quality.Protocol(methods.named(known, [0.1]), {})
    quality.check(pair, plan)
    assert set(methods.DEFAULT) <= set(known)


def test_help_names_the_default_methods(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "quality", "--help"])
    assert f"[default:{','.join(methods.DEFAULT)}]" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["oak"], "method 'oak' is not allowed: known are plain, generate, chain, tree, auto, attention, "),
        (["none"], "method 'none' is not allowed"),
        (["verifier@x"], "write a keep_ratio behind the @"),
        (["generate@0.5"], "method 'generate@0.5' is not allowed: generate prunes nothing"),
        (["chain@0.5"], "chain prunes nothing"),
        (["lookup@0.5"], "lookup prunes nothing"),
    ],
)
def test_an_unknown_method_is_named(names, message):
    with pytest.raises(ConfigError, match=message):
        methods.named(names, [0.1])


def test_a_method_of_ones_own_is_written_as_settings():
    found = methods.written("mine", ["focus=1", "pruner=uniform", "per_visual=true", "keep_tokens=none", "seed=3"])
    assert found == {
        "drafter": "model", "policy": "fixed", "tree": "paper", "focus": 1.0, "pruner": "uniform",
        "per_visual": True, "keep_tokens": None, "seed": 3,
    }  # fmt: skip
    for text, message in (
        ("focus", "write setting=value"),
        ("oak=1", "unknown setting 'oak'"),
        ("seed=x", "seed='x' is not allowed: it must be int"),
        ("eager=yes", "eager='yes' is not allowed: true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            methods.written("mine", [text])
    for name in ("", "plain", "_mine", "x$y", "a b"):
        with pytest.raises(ConfigError, match="is not allowed as a name of your own"):
            methods.written(name, [])


def test_what_cannot_be_run_is_refused_before_any_work(pair):
    alone = SpecVLM(pair.target)
    for model, plan, message in (
        (alone, protocol("plain", "tree"), "method 'tree' needs a draft"),
        (pair, protocol("plain", "generate", settings={"temperature": 1.0}), "temperature is not allowed beside"),
        (pair, protocol("plain", "generate", settings={"stop": ("x",)}), "stop is not allowed beside the method"),
        (pair, protocol("verifier", settings={"mass": 2.0}), "mass=2.0 is not allowed"),
        (
            pair,
            protocol("verifier", settings={"keep_tokens": 7}),
            "keep_tokens is not allowed beside method",
        ),
        (pair, quality.Protocol({"x": {"drafter": "none", "stop": ("a",)}}, {}), "stop of method 'x' is not allowed"),
    ):
        with pytest.raises(ConfigError, match=message):
            quality.check(model, plan)
    quality.check(alone, protocol("plain", "generate", "self", "lookup"))


# The journal


def test_a_folder_of_another_run_is_refused(pair, tmp_path):
    ran(pair, samples(1), protocol("plain"), tmp_path)
    before = (tmp_path / journal.NAME).read_text()
    for plan, message in (
        (protocol("plain", "tree"), "holds another run, whose methods, tree is null and not {"),
        (protocol("plain", seed=1), "holds another run, whose seed is 0 and not 1: give another folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            ran(pair, samples(1), plan, tmp_path)
    assert (tmp_path / journal.NAME).read_text() == before


def test_a_run_goes_on_with_other_pictures(pair, tmp_path):
    ran(pair, samples(1), protocol("verifier", num_overlays=0), tmp_path)
    lines = ran(pair, samples(1), protocol("verifier", num_overlays=1), tmp_path).lines
    kinds = [line["kind"] for line in lines]
    assert (kinds.count("answer"), kinds.count("overlay")) == (1, 1)


def test_a_folder_of_other_questions_or_another_file_is_refused(pair, tmp_path):
    ran(pair, samples(2), protocol("plain"), tmp_path)
    others = [replace(samples(2).samples[0], prompt="Why?"), samples(2).samples[1]]
    with pytest.raises(ConfigError, match="holds another run, whose samples_sha256 is"):
        ran(pair, replace(samples(2), samples=tuple(others)), protocol("plain"), tmp_path)
    with pytest.raises(ConfigError, match=r"holds another run, whose loaded, a\.py is null and not"):
        ran(pair, samples(2), protocol("plain", loaded={"a.py": "1"}), tmp_path)


@pytest.mark.parametrize("content", [b"precious", b"one\ntwo", b"\xff\xfe\n", b'{"kind": "answer"}\n{"ki'])
def test_a_file_of_somebody_else_is_left_as_it_is(tmp_path, content):
    (tmp_path / journal.NAME).write_bytes(content)
    with pytest.raises(ConfigError, match="give the --out of bench quality"):
        Journal(tmp_path, {"a": 1})
    assert (tmp_path / journal.NAME).read_bytes() == content


def test_a_run_that_was_killed_over_its_first_line_begins_anew(tmp_path):
    (tmp_path / journal.NAME).write_bytes(b'{"kind": "run", "a"')
    with Journal(tmp_path, {"a": 1}) as again:
        assert again.lines == []
    assert journal.read(tmp_path).origin == {"kind": "run", "a": 1}


def test_two_runs_do_not_write_one_journal(tmp_path):
    with Journal(tmp_path, {"a": 1}), pytest.raises(ConfigError, match="is being written by another run"):
        Journal(tmp_path, {"a": 1})
    with Journal(tmp_path, {"a": 1}) as again:
        assert again.lines == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "run"}\n{"kind"\n{"kind": "answer"}\n', "line 2 is no line of bench quality"),
        ('{"kind": "answer"}\n', "does not begin with a line of kind run"),
        ('{"kind": "run"', "does not begin with a line of kind run"),
    ],
)
def test_what_is_no_journal_is_named_by_line(tmp_path, text, message):
    (tmp_path / journal.NAME).write_text(text)
    with pytest.raises(ConfigError, match=message):
        journal.read(tmp_path)


# The command


def command(tmp_path, *options):
    pair = ["--target", tiny.checkpoint("qwen2_5_vl", "target"), "--draft", tiny.checkpoint("qwen2_5_vl", "near")]
    (tmp_path / "data.jsonl").write_text(
        "\n".join(
            (
                '{"id": "a", "video": "a.mp4", "prompt": "What happens?"}',
                '{"id": "b", "video": "gone.mp4", "prompt": "What?"}',
                '{"id": "c", "video": "a.mp4", "prompt": ""}',
                '{"id": "d", "video": ',
                '{"id": "a", "video": "a.mp4", "prompt": "And now?"}',
                '{"id": "e", "video": "a.mp4", "prompt": "And now?"}',
            )
        )
    )
    media.make_video(tmp_path / "a.mp4", 8, rate=2)
    common = ["--data", str(tmp_path / "data.jsonl"), "--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    return ["bench", "quality", *pair, *common, *options]


def test_malformed_data_are_reported_by_line_and_stop_nothing(tmp_path, capsys):
    assert cli.main(command(tmp_path, "--methods", "plain,tree", "--no-report")) == 0
    run = journal.read(tmp_path / "out")
    assert {sample for sample, _ in run.answers} == {"a", "e"}
    where = [problem["where"] for problem in run.of_kind("problem")]
    assert {text.split(", ")[-1] for text in where} == {"line 2", "line 3", "line 4", "line 5"}
    error = capsys.readouterr().err
    named = [number for number in range(1, 7) if f"warning: data.jsonl, line {number}: " in error]
    assert named == [2, 3, 4, 5]


def test_an_answer_that_differs_in_fp32_is_exit_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "generate", lambda *args, **kwargs: reference.Reference((1, 2), ((1.0, 1),) * 2, ()))
    assert cli.main(command(tmp_path, "--methods", "plain,generate", "--no-report")) == 1
    assert [line["method"] for line in journal.read(tmp_path / "out").of_kind("difference")] == ["generate"] * 2


def test_a_pruner_from_a_file_is_ranked_beside_the_others(tmp_path, monkeypatch):
    file = tmp_path / "recent.py"
    file.write_text(
        "import torch\nfrom specvlm import pruner\n\n\n@pruner('recent')\ndef recent(scores, grid, count):\n"
        "    return torch.arange(len(scores) - count, len(scores), device=scores.device)\n"
    )
    monkeypatch.setattr("specvlm.prune.selection.PRUNERS", dict(prune.PRUNERS))
    options = ("--load", str(file), "--methods", "plain,recent", "--method", "mine", "pruner=recent", "tree=chain:2")
    assert cli.main(command(tmp_path, *options, "--no-report", "--untimed")) == 0
    run = journal.read(tmp_path / "out")
    assert {method for _, method in run.answers} == {"plain", "recent@0.1", "mine"}
    assert run.origin["methods"]["mine"]["tree"] == "chain:2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "oak"], "method 'oak' is not allowed"),
        (["--keep-ratios", "1,x"], "keep_ratios='1,x' is not allowed"),
        (["--keep-ratios", "2", "--methods", "verifier"], "keep_ratio=2.0 is not allowed"),
        (["--method", "mine", "tree=oak"], "tree='oak'"),
        (["--load", "nowhere.py"], "nowhere.py cannot be read (No such file or directory)"),
        (["--pruner", "uniform"], "unknown argument '--pruner'"),
        (["--preset", "oak"], "preset='oak' is unknown"),
        (["--limit", "0"], "limit=0 is not allowed"),
        (["--overlays", "-1"], "overlays=-1 is not allowed"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path, options, message, capsys):
    assert cli.main(command(tmp_path, "--quiet", "--no-report", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_preset_is_data_prompt_and_settings(tmp_path, capsys):
    """Its data set is asked for, which is not here; settings that are given beside it win."""
    argv = command(tmp_path, "--preset", "paper-7b", "--methods", "plain,verifier", "--no-report", "--num-frames", "4")
    assert cli.main(argv) == 0
    origin = journal.read(tmp_path / "out").origin
    assert origin["settings"]["mass"] == 0.4
    assert origin["settings"]["max_new_tokens"] == 8
    assert origin["settings"]["num_frames"] == 4
    assert origin["methods"]["verifier@0.1"]["tree"] == "paper"
    assert "drafter" not in origin["settings"]
