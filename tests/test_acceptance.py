"""The acceptance sweep: what it counts and what it prints."""

import json
from pathlib import Path

import pytest

from specvlm import ConfigError, SpecVLM, cli
from specvlm.bench import acceptance
from specvlm.bench.acceptance import Method, Result, interval, methods, read_clips, table
from specvlm.engine import bundled


def result(clip, pruner, ratio, accepted, **changes):
    fields = {"tree": "paper", "visual_tokens": 100, "kept_visual_tokens": 10, "completion_tokens": 40, "rounds": 10}
    fields |= {"target_passes": 11, "is_plain": True, "is_generate": True} | changes
    return Result(clip=clip, pruner=pruner, keep_ratio=ratio, accepted_tokens=accepted, **fields)


def test_the_interval_is_students():
    # standard deviation 2.1602, over sqrt(4), times the 97.5 % quantile 3.1824 of 3 degrees of freedom
    mean, half = interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(3.4373, rel=2e-3)
    assert interval([5.0]) == (5.0, 0.0)


def test_unpruned_is_swept_once_a_tree():
    assert methods(["uniform", "none"], [1.0, 0.5, 0.1], ["paper", "chain:5"]) == [
        Method("none", 1.0, "paper"),
        Method("uniform", 0.5, "paper"),
        Method("uniform", 0.1, "paper"),
        Method("none", 1.0, "chain:5"),
        Method("uniform", 0.1, "chain:5"),
    ]


def test_the_table_pairs_by_clip_and_counts_what_differs():
    results = [
        *(result(clip, "none", 1.0, accepted) for clip, accepted in (("a", 40), ("b", 50))),
        *(result(clip, "verifier", 0.1, accepted) for clip, accepted in (("a", 38), ("b", 48))),
        *(result(clip, "random", 0.1, accepted) for clip, accepted in (("a", 28), ("b", 38))),
    ]
    results[-1] = result("b", "random", 0.1, 38, is_generate=False)
    text = table(results, "specvlm bench acceptance")
    assert "5 of 6 answers" in text
    assert "| verifier | 0.1 | 4.30 ± 6.36 | 96% |" in text  # half-width: t(1) = 12.71 times sqrt(0.5 / 2)
    assert "| 0.1 | **+1.00 ± 0.00** |" in text  # the same gap on every clip, however far apart the clips are


def test_the_command_writes_page_and_lines(tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").symlink_to(Path(bundled("clips"), "clip00.mp4"))
    (clips / "clips.jsonl").write_text(json.dumps({"id": "a", "file": "a.mp4", "prompt": "What happens?"}) + "\n")
    page, out = tmp_path / "sub" / "page.md", tmp_path / "out.jsonl"
    args = ["bench", "acceptance", "--clips", str(clips), "--pruners", "verifier,uniform", "--keep-ratios", "1,0.1"]
    args += ["--trees", "chain:3", "--max-new-tokens", "12", "--page", str(page), "--out", str(out)]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == ""
    provenance, *lines = map(json.loads, out.read_text().splitlines())
    assert set(provenance) == {"command", "commit", "versions"}
    assert [(line["pruner"], line["keep_ratio"]) for line in lines] == [
        ("none", 1),
        ("verifier", 0.1),
        ("uniform", 0.1),
    ]
    assert all(line["is_plain"] and line["is_generate"] for line in lines)
    assert all(line["accepted_tokens"] > 0 and line["completion_tokens"] == 12 for line in lines)
    assert "3 of 3 answers" in page.read_text()


def test_every_round_drafts_the_whole_tree_whether_it_pays_or_not(monkeypatch):
    usual, drafted = SpecVLM.decode, []

    def decode(self, request, start, *args):
        for latest in usual(self, request, start, *args):
            drafted.append(len(latest.draft))
            yield latest

    monkeypatch.setattr(SpecVLM, "decode", decode)
    monkeypatch.setattr(acceptance, "_generate", lambda *args: [])
    clips, model = Path(bundled("clips")), SpecVLM.from_pretrained(device="cpu")
    sweep = [Method("verifier", 0.1, "dynamic")]
    [found] = acceptance.run(model, clips, read_clips(clips)[:1], sweep, max_new_tokens=24)
    assert found.is_plain
    plain, rounds = drafted[:24], drafted[25:]  # each after the token of the prefill
    assert set(plain) == {0}
    assert set(rounds[:-1]) == {25}  # the last may have but one token left to come


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--keep-ratios", "1,x"], "keep_ratios='1,x'"),
        (["--keep-ratios", "2"], "keep_ratio=2.0"),
        (["--pruners", "best"], "pruner='best'"),
        (["--trees", "oak"], "tree='oak'"),
        (["--clips", "nowhere"], "there is no nowhere/clips.jsonl"),
        (["--out", "/proc/nowhere/a.jsonl"], "/proc/nowhere/a.jsonl cannot be written"),
    ],
)
def test_a_bad_sweep_is_one_line(args, words, capsys):
    assert cli.main(["bench", "acceptance", *args]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_empty_list_of_clips_is_refused(tmp_path):
    (tmp_path / "clips.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        read_clips(tmp_path)


def test_a_broken_line_of_clips_is_named(tmp_path):
    (tmp_path / "clips.jsonl").write_text('{"id": 1, "file": "a", "prompt": "b"}\n{"id": 2}\n')
    with pytest.raises(ConfigError, match=r"clips.jsonl, line 2 is no JSON object with id"):
        read_clips(tmp_path)
