"""The report of quality runs: its statistics, its figures against ones worked out by hand, its page in a browser."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
import runs
from PIL import Image

from specvlm import ConfigError
from specvlm_bench import style
from specvlm_bench.report import build, figures, page, protocol, render, results, stats, tables
from specvlm_bench.report.render import Column, Count, Table
from specvlm_bench.report.stats import Estimate

pytest.importorskip("matplotlib")


def loaded(*directories):
    return results.load(directories)


def column(table, name):
    """Return a column's cells by the first one of their rows."""
    place = [one.name for one in table.columns].index(name)
    return {row[0]: row[place] for row in table.rows}


def test_coverage_on_clustered_data():
    # 400 sets of 20 videos with 3 samples each, the effect of a video twice that of a sample. Exact 95 % intervals are
    # outside of 91 to 98.5 % of 400 sets once in 2,900 cases each (binomial); by sample they hold the truth in 79 %.
    dice, videos = np.random.default_rng(0), np.repeat(np.arange(20), 3).tolist()
    held = {"mean": 0, "median": 0, "naive": 0}
    widths = {"mean": 0.0, "naive": 0.0}
    for _ in range(400):
        values = (dice.normal(size=20)[videos] + 0.5 * dice.normal(size=60)).tolist()
        found = {"mean": stats.mean(values, videos), "median": stats.median(values, videos)}
        found["naive"] = stats.mean(values, list(range(60)))
        for name, one in found.items():
            held[name] += one.low <= 0 <= one.high
        for name in widths:
            widths[name] += found[name].high - found[name].low
    assert 0.91 <= held["mean"] / 400 <= 0.985
    assert 0.91 <= held["median"] / 400 <= 0.985
    assert held["naive"] / 400 < 0.9
    assert (
        widths["mean"] > 1.4 * widths["naive"]
    )  # sqrt((1 + 0.25 / 3) / ((1 + 0.25) / 3)) = 1.61, less what is estimated


def test_estimates_by_hand():
    assert stats.mean([1, 2, 6], "aab").value == 3
    assert stats.median([5, 1, 2, 4], "aabb").value == 3
    assert stats.pooled([1, 0, 3], [2, 0, 4], "abc").value == pytest.approx(4 / 6)
    assert stats.mean_difference([1, 2], [3, 5], "ab").value == 2.5
    assert stats.median_ratio([2, 4, 1], [1, 1, 1], "abc").value == 0.5
    assert stats.median([], []) is None
    assert stats.pooled([0], [0], "a") is None


def test_one_video_gives_no_interval():
    assert stats.mean([1, 2, 6], "aaa") == Estimate(3, None, None)
    assert stats.median([1, 2], "aa") == Estimate(1.5, None, None)
    assert stats.pooled([1], [2], "a") == Estimate(0.5, None, None)


def test_two_videos_give_their_range():
    # of {1, 1, 7} and {3}: resamples are both (mean 3), or twice one of them
    assert stats.mean([1, 1, 7, 3], "aaab") == Estimate(3, 3, 3)
    assert stats.mean([1, 1, 4, 10], "aaab") == Estimate(4, 2, 10)
    assert stats.median([1, 1, 4, 10], "aaab") == Estimate(2.5, 1, 10)


@pytest.mark.parametrize("count", [6, 7, 8, 23])
def test_resampled_medians_are_those_of_the_samples_drawn(count):
    dice = np.random.default_rng(count)
    values = dice.permutation(2.0 ** np.arange(count))  # far apart, so that middles between two are seen
    videos = np.arange(count) if count < 10 else np.sort(dice.integers(0, 7, size=count))
    numbers = np.unique(videos, return_inverse=True)[1]
    slow = [np.median(np.repeat(values, draw[numbers])) for draw in stats._draws(numbers.max() + 1)]
    tail = stats._tail(numbers.max() + 1)
    found = stats.median(values.tolist(), videos.tolist())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [tail, 1 - tail])))


def test_tails_are_those_of_student():
    # t at 97.5 % with 9 and 39 degrees of freedom: 2.262 and 2.023, times sqrt(10 / 9) and sqrt(40 / 39)
    assert stats._tail(10) == pytest.approx(0.00855, rel=0.03)
    assert stats._tail(40) == pytest.approx(0.02025, rel=0.01)
    assert stats._tail(10**6) == pytest.approx(0.025, rel=0.001)


# Figures worked out by hand


@pytest.fixture
def small(tmp_path):
    """Two samples of two videos; the second one's tree answer differs."""
    methods = {"plain": {"drafter": "none"}, "tree": {"drafter": "model", "pruner": "none"}, "lookup": {}}
    one, two = (5, 6, 7, 8, 9, runs.EOS), (5, 6, 7, 8)
    plain = {"drafted": (0,) * 6, "tokens": (1,) * 6}
    lines = [
        runs.answer("a", "plain", ids=one, ms=12, first_s=1, **plain),
        runs.answer("b", "plain", ids=two, ms=10, first_s=3, drafted=(0,) * 4, tokens=(1,) * 4),
        # rounds accept 2, 0 and, cut by the end, 0 tokens
        runs.answer("a", "tree", ids=one, ms=4, first_s=1.5, drafted=(0, 25, 25, 25), tokens=(1, 3, 1, 1)),
        # a round accepts 1 token, then a pass drafts none
        runs.answer(
            "b",
            "tree",
            ids=(5, 6, 9, 8),
            ms=5,
            first_s=3.5,
            drafted=(0, 25, 0),
            tokens=(1, 2, 1),
            peak_memory_bytes=2 << 30,
        ),
        runs.answer("a", "lookup", ids=one, ms=24, peak_memory_bytes=5 << 30, **plain),
        {"kind": "failure", "sample": "b", "video": "b.mp4", "method": "lookup", "text": "once"},
        {"kind": "failure", "sample": "b", "video": "b.mp4", "method": "lookup", "text": "twice"},
        {"kind": "failure", "sample": "a", "video": "a.mp4", "method": "lookup", "text": "answered later"},
        runs.difference("b", "tree", 2, 7, 9, 0.25),
    ]
    return runs.put(tmp_path / "small", runs.origin(methods, 2), *lines)


def test_the_main_table_by_hand(small):
    [run] = loaded(small)
    table = tables.methods(run)
    assert column(table, "samples") == {"plain": 2, "tree": 2, "lookup": 1}
    assert column(table, "identical") == {"plain": None, "tree": Count(1, 2), "lookup": Count(1, 1)}
    mats = column(table, "MAT")
    assert mats == {"plain": None, "tree": Estimate(pytest.approx(5 / 6), pytest.approx(2 / 3), 1), "lookup": None}
    assert column(table, "acceptance length")["tree"] == pytest.approx(11 / 6)
    assert column(table, "target passes")["tree"] == Estimate(3.5, 3, 4)
    assert column(table, "new tokens") == {"plain": 4.5, "tree": 4.5, "lookup": 5}
    assert column(table, "with EOS") == {"plain": 5, "tree": 5, "lookup": 6}
    assert column(table, "ms a token")["tree"] == Estimate(4.5, 4, 5)
    assert column(table, "speedup a token") == {"plain": None, "tree": Estimate(2.5, 2, 3), "lookup": Estimate(0.5)}
    assert column(table, "TTFT, s")["tree"] == Estimate(2.5, 1.5, 3.5)
    # plain takes 1.06 and 3.03 s, the tree 1.52 and 3.515 s
    assert column(table, "end to end, s")["tree"].value == pytest.approx((1.52 + 3.515) / 2)
    assert column(table, "speedup end to end")["tree"].value == pytest.approx((1.06 / 1.52 + 3.03 / 3.515) / 2)
    assert column(table, "peak memory, GiB") == {"plain": 1.5, "tree": 2, "lookup": 5}


def test_methods_that_keep_as_much_are_paired_by_sample(tmp_path):
    tree = {"drafter": "model", "tree": "paper", "policy": "fixed"}
    methods = {
        "plain": {"drafter": "none"},
        "tree": tree | {"pruner": "none"},
        "chain": tree | {"tree": "chain:5", "pruner": "none"},
        "moved": tree | {"pruner": "none", "keep_ratio": 0.1, "positions": "repacked"},
        "a": tree | {"pruner": "a"},  # at the default's 0.1
        "b": tree | {"pruner": "b", "keep_ratio": 0.1},
        "c": tree | {"pruner": "c", "keep_ratio": 0.5},
        "d": tree | {"pruner": "d", "keep_tokens": 9},
        "e": tree | {"pruner": "e", "drafter": "self"},
    }
    accepted = {
        "tree": (4, 5),
        "moved": (1, 3),
        "a": (3, 4),
        "b": (4, 2),
        "chain": (5, 5),
        "c": (0, 0),
        "d": (1, 1),
        "e": (2, 2),
    }
    lines = [
        runs.answer(sample, method, drafted=(0, 25), tokens=(1, counts[place] + 1))
        for place, sample in enumerate("xy")
        for method, counts in accepted.items()
        if (sample, method) != ("y", "c")
    ]
    [run] = loaded(runs.put(tmp_path / "run", runs.origin(methods, 2), *lines))
    [table] = tables.paired(run)
    assert table.rows == (
        ("moved", "tree", 2, Estimate(-2.5, -3, -2)),
        ("b", "a", 2, Estimate(-0.5, -2, 1)),
    )
    assert table in tables.of_run(run)
    alone = {name: methods[name] for name in ("plain", "tree", "a")}
    [run] = loaded(runs.put(tmp_path / "alone", runs.origin(alone, 2), *lines))
    assert tables.paired(run) == []


def test_acceptance_by_depth_by_hand(small):
    [run] = loaded(small)
    of_all, of_before = tables.by_depth(run)
    # 4 rounds; 2 accepted a node of depth 1, one of them another of depth 2
    assert [cell.value for cell in of_all.rows[0][1:]] == [0.5, 0.25]
    assert [cell.value for cell in of_before.rows[0][1:]] == [0.5, 0.5]
    assert [one.name for one in of_all.columns] == ["method", "depth 1", "depth 2"]
    assert [row[0] for row in of_all.rows] == ["tree"]


def test_acceptance_over_the_text_by_hand():
    # rounds begin at tokens 1, 5, 16 and 18 and accept 3, 10, 1 and 0; the fifth is cut by the end
    line = runs.answer("a", "tree", drafted=(0, 25, 25, 25, 25, 25), tokens=(1, 4, 11, 2, 1, 9))
    assert figures._rounds_by_bin(line) == {0: (2, 13), 1: (2, 1)}
    other = runs.answer("b", "tree", drafted=(0, 0, 25, 25), tokens=(1, 1, 2, 2))
    assert figures._rounds_by_bin(other) == {0: (1, 1)}
    points = figures._over_text([line, other])
    assert [(at, one.value) for at, one in points] == [(8, pytest.approx(14 / 3)), (24, 0.5)]
    assert [at for at, _ in figures._over_text([line, *[other] * 4])] == [8]  # few texts reach further


def test_what_differs_what_failed_and_what_was_left_out(small):
    [run] = loaded(small)
    found = tables.differences(run)
    assert found.rows == (("b", "tree", 2, f'" {runs.WORDS[7]}" (7)', f'" {runs.WORDS[9]}" (9)', 0.25),)
    assert tables.failures(run).rows == (("b", "lookup", "twice"),)
    assert tables.problems(run).rows == ()
    assert [table.slug for table in tables.of_run(run)][-2:] == ["differences", "failures"]


def test_a_difference_of_which_the_journal_says_nothing_is_found_all_the_same(tmp_path):
    lines = [runs.answer("a", "plain", ids=(5, 6)), runs.answer("a", "tree", ids=(5, 6, runs.EOS))]  # the same text
    [run] = loaded(runs.put(tmp_path, runs.origin(runs.FEW, 1), *lines))
    assert tables.differences(run).rows == (("a", "tree", 2, "end of text", str(runs.EOS), None),)
    assert column(tables.methods(run), "identical")["tree"] == Count(0, 1)


def test_all_identical_is_one_line(tmp_path):
    [run] = loaded(runs.run(tmp_path, runs.FEW, 6, is_clean=True))
    assert render.markdown(tables.differences(run)) == (
        "### Where answers part from plain decoding\n\nAll 12 answers have exactly plain decoding's tokens.\n"
    )


def test_headlines(small, tmp_path):
    assert protocol.headline(loaded(small)[0]) == (
        "2 methods on 2 samples of 2 videos: 2 of 3 answers have exactly plain decoding's tokens; the fastest, tree, "
        "decodes 2.50 times (2.00 to 3.00) as fast, 0.78 times (0.70 to 0.86) from end to end."
    )
    untimed = runs.run(tmp_path / "untimed", runs.FEW, 1, is_clean=True, is_timed=False)
    assert re.fullmatch(
        r"2 methods on 1 sample of 1 video: all 2 answers have exactly plain decoding's tokens; most is accepted with "
        r"(tree|verifier@0\.1), MAT \d\.\d\d\.",
        protocol.headline(loaded(untimed)[0]),
    )
    without = runs.put(tmp_path / "without", runs.origin(runs.FEW, 1), runs.answer("a", "tree"))
    assert (
        protocol.headline(loaded(without)[0]) == "1 method on 1 sample of 1 video: no plain decoding to compare with."
    )
    empty = runs.put(tmp_path / "empty", runs.origin(runs.FEW, 1))
    assert protocol.headline(loaded(empty)[0]) == "There is no answer yet."


def test_columns_without_data_are_left_out(tmp_path):
    [run] = loaded(runs.run(tmp_path, runs.FEW, 4, is_timed=False))
    assert [one.name for one in tables.methods(run).columns] == [
        "method", "samples", "identical", "MAT", "acceptance length", "target passes", "new tokens", "with EOS"
    ]  # fmt: skip
    drawn = {one.slug: one for one in figures.of_run(run)}
    assert drawn["stages"].figure is None
    assert drawn["stages"].note == "Nothing was timed."
    assert drawn["speedup-over-visual-tokens"].figure is None


def test_videos_and_few_videos(tmp_path):
    one, few, many = (tables.methods(loaded(runs.run(tmp_path / str(count), runs.FEW, count))[0]).notes[-1]
                      for count in (2, 8, 12))  # fmt: skip
    assert one == "All samples are of one video, which says nothing about others: there are no intervals."
    assert "4,000 resamples of the 4 videos" in few
    assert few.endswith("Over so few videos they hold the true value less often than that: take 5 or more.")
    assert many.endswith("4,000 resamples of the 6 videos (cluster bootstrap, expanded percentiles).")


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    [run] = loaded(runs.run(tmp_path / "killed", runs.METHODS, 20, stop=50))
    done = len(run.answers) + len(run.failures)
    assert 40 < done < 50
    told = f"Unfinished: {done} of 280 answers are there; the same command goes on with the rest."
    assert protocol.progress(run) == told
    written = build([tmp_path / "killed"], tmp_path / "out")
    assert told in written.markdown
    assert told in written.paths[0].read_text()
    assert protocol.progress(loaded(runs.run(tmp_path / "whole", runs.FEW, 4))[0]) is None


# Two runs


def test_two_runs_by_hand(small, tmp_path):
    lines = [
        runs.answer("a", "tree", ids=(5, 6, 7), ms=8, drafted=(0, 25), tokens=(1, 5)),  # MAT 4 beside 2 / 3
        runs.answer("b", "tree", ids=(5, 6, 9, 8), ms=5, drafted=(0, 25, 25), tokens=(1, 2, 2)),  # 1 beside 1
        runs.answer("b", "plain", prompt="Another question?"),
        runs.answer("c", "tree", ms=15, drafted=(0, 25), tokens=(1, 3)),  # nothing was drafted in the first run
        runs.answer("d", "tree"),
    ]
    with (small / "answers.jsonl").open("a") as file:
        file.write(json.dumps(runs.answer("c", "tree", ms=10)) + "\n")
    methods = {"plain": {"drafter": "none"}, "tree": {"drafter": "model", "pruner": "uniform"}, "new": {}}
    second = runs.put(tmp_path / "second", runs.origin(methods, 4, gpu="NVIDIA H200", command="other"), *lines)
    compared, differing = tables.of_two(*loaded(small, second))
    [row] = compared.rows
    names = [one.name for one in compared.columns]
    found = dict(zip(names, row, strict=True))
    assert found["method"] == "tree"
    assert found["samples"] == 3
    assert found["same tokens"] == Count(2, 3)
    assert found["MAT, small"].value == pytest.approx(5 / 6)
    assert found["MAT, second"].value == 2.5
    assert found["MAT, difference"] == Estimate(pytest.approx(5 / 3), 0, pytest.approx(10 / 3))
    assert found["ms a token, ratio"] == Estimate(1.5, 1, 2)
    assert compared.notes[0].startswith("3 samples are in both runs, of 3 in small and 4 in second")
    assert compared.notes[-2:] == ("Only in small: lookup.", "Only in second: new.")
    assert differing.rows == (
        ("gpu", "null", '"NVIDIA H200"'),
        ("samples", "2", "4"),
        ("methods.tree.pruner", '"none"', '"uniform"'),
    )


def test_runs_that_share_nothing(small, tmp_path):
    second = runs.put(tmp_path / "second", runs.origin(runs.FEW, 1), runs.answer("z", "plain"))
    compared, _ = tables.of_two(*loaded(small, second))
    assert compared.rows == ()
    assert compared.notes[0].startswith("0 samples are in both runs")
    assert "intervals" not in " ".join(compared.notes)


def test_each_run_has_a_name_of_its_own(tmp_path):
    one, other, third = (runs.run(tmp_path / name, runs.FEW, 2) for name in ("x/run", "y/run", "Z!"))
    found = loaded(one, other, third)
    assert [run.name for run in found] == [str(one), str(other), "Z!"]
    assert [run.prefix for run in found] == ["1-run-", "2-run-", "3-z-"]
    names = [path.relative_to(tmp_path / "out").as_posix() for path in build([one, third], tmp_path / "out").paths]
    assert names[:3] == ["report.html", "tables.md", "tables.tex"]
    assert len(set(names)) == len(names)
    assert {"tables/1-run-methods.csv", "tables/2-z-compared.csv", "plots/2-z-mat-by-sample.png"} <= set(names)


# What is written


AWKWARD = Table(
    "awkward",
    "50% of _all_ & more",
    (Column("what"), Column("share", ".1%"), Column("number", "d"), Column("of", "d")),
    (
        ("a|b <c> {d} #1 $x_y^2~ \\ \n new", Estimate(0.5, 0.25, 0.755), 3, Count(1, 2)),
        ("--flag 中", Estimate(1 / 3), 1234567, None),
        ("", None, None, None),
    ),
    ("100% of notes",),
)


def test_markdown():
    assert render.markdown(AWKWARD).splitlines() == [
        "### 50% of \\_all\\_ & more",
        "",
        "| what | share | number | of |",
        "|---|---|---|---|",
        "| a\\|b \\<c> {d} #1 $x\\_y^2~ \\\\   new | 50.0% (25.0% to 75.5%) | 3 | 1 of 2 |",
        "| --flag 中 | 33.3% | 1234567 |  |",
        "|  |  |  |  |",
        "",
        "100% of notes",
    ]


def test_csv_holds_plain_numbers():
    head, *rows = csv.reader(io.StringIO(render.comma_separated(AWKWARD)))
    assert head == ["what", "share", "share, low", "share, high", "number", "of", "of, of"]
    assert rows[0] == [AWKWARD.rows[0][0], "0.5", "0.25", "0.755", "3", "1", "2"]
    assert rows[1] == ["--flag 中", "0.333333", "", "", "1234567", "", ""]
    assert rows[2] == [""] * 7


def test_latex_is_escaped():
    text = render.latex(AWKWARD)
    assert r"\caption{50\% of \_all\_ \& more. 100\% of notes}" in text
    assert r"a\textbar{}b \textless{}c\textgreater{} \{d\} \#1 \$x\_y\textasciicircum{}2\textasciitilde{} " in text
    assert r"\textbackslash{}   new & 50.0\% & 3 & 1 of 2 \\" in text
    assert r"{\scriptsize 25.0\% to 75.5\%}" in text
    assert r"-{}-flag U+4E2D" in text


def test_wide_tables_are_several_floats():
    wide = Table("wide", "Wide", tuple(Column(f"c{place}", "d") for place in range(15)), (tuple(range(15)),))
    text = render.latex(wide)
    heads = [line for line in text.splitlines() if "shortstack" in line]
    assert [re.findall(r"\{c(\d+)\}", head) for head in heads] == [
        ["0", *map(str, range(1, 8))],
        ["0", *map(str, range(8, 15))],
    ]
    assert text.count(r"\caption{Wide, continued.}") == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path):
    build([runs.run(tmp_path / name, runs.EIGHT, 6) for name in ("one", "two")], tmp_path)
    (tmp_path / "awkward.tex").write_text(render.latex(AWKWARD))
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{tables.tex}\\input{awkward.tex}"
        "\\end{document}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(("methods", "lines"), [(runs.FEW, True), (runs.EIGHT, True), (runs.MANY, False)])
def test_pictures_of_three_eight_and_many_methods(tmp_path, methods, lines):
    [run] = loaded(runs.run(tmp_path, methods, 12))
    drawn = {one.slug: one for one in figures.of_run(run)}
    assert [slug for slug, one in drawn.items() if one.figure is None] == ["mat-over-keep-ratio"] * (len(methods) == 3)
    legends = [text.get_text() for text in drawn["mat-by-sample"].figure.legends[0].get_texts()] if lines else []
    rows = [] if lines else [text.get_text() for text in drawn["mat-by-sample"].figure.axes[0].get_yticklabels()]
    assert legends + rows == list(run.drafting)


def test_a_method_has_one_colour_in_all_pictures(tmp_path):
    [run] = loaded(runs.run(tmp_path, runs.EIGHT, 12))
    colours = [
        {line.get_label(): line.get_color() for line in one.figure.axes[0].lines if line.get_label() in runs.EIGHT}
        for one in figures.of_run(run)
        if one.slug in ("speedup-over-visual-tokens", "acceptance-by-depth", "acceptance-over-text", "mat-by-sample")
    ]
    assert len(colours) == 4
    assert all(found.items() >= colours[-1].items() for found in colours)


def test_methods_that_differ_in_more_than_pruner_and_ratio_are_apart(tmp_path):
    [run] = loaded(runs.run(tmp_path, runs.MANY, 4))
    found = figures._panels(run)
    assert list(found) == ["drafter model", "drafter self"]
    assert found["drafter self"]["none", 1.0] == "self-tree"
    assert {pruner for pruner, _ in found["drafter model"]} == {"none", *runs.PRUNERS}
    assert found["drafter model"]["uniform", 0.05] == "uniform@0.05"


def test_points_of_one_keep_ratio_stand_at_one_place(tmp_path):
    [run] = loaded(runs.run(tmp_path, runs.METHODS, 12))
    axes = figures.keep_ratios(run).figure.axes[0]
    lines = {line.get_label(): line.get_xdata().tolist() for line in axes.lines if line.get_label() in runs.PRUNERS}
    assert set(map(tuple, lines.values())) == {(0, 1, 2)}
    assert set(lines) == set(runs.PRUNERS)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["5%", "10%", "50%"]
    assert axes.get_ylabel() == "drafted tokens accepted a round (MAT)"


def test_an_interval_alone_is_seen(tmp_path):
    methods = {name: runs.METHODS[name] for name in ("plain", "verifier@0.1", "uniform@0.1")}
    [run] = loaded(runs.run(tmp_path, methods, 12))
    axes = figures.keep_ratios(run).figure.axes[0]
    ends = [collection.get_segments()[0][:, 1] for collection in axes.collections]
    mats = [tables.mat(run, name) for name in ("verifier@0.1", "uniform@0.1")]
    assert [tuple(found) for found in ends] == [(one.low, one.high) for one in mats]


def test_bins_of_visual_tokens():
    assert figures._bins([64, 64, 128]) == [(64, 128, 64), (128, float("inf"), 128)]
    bins = figures._bins(list(range(100, 220)))
    assert [low for low, _, _ in bins] == [100, 119, 139, 159, 179, 199]
    points = [(64, 2.0, "a"), (64, 4.0, "b"), (128, 1.0, "c")]
    found = figures._binned(points, figures._bins([64, 64, 128]))
    assert [(middle, one.value) for middle, one in found] == [(64, 3), (128, 1)]


# The page


class Page(HTMLParser):
    """What a page refers to, the tags that are not closed, and its text."""

    VOID = ("meta", "link", "img", "br", "path", "use", "rect", "image")

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.texts, self.tags, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.links += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", data)
        self.texts.append(data)


def test_the_page_is_whole_and_refers_to_nothing_outside(tmp_path):
    directories = [runs.run(tmp_path / "one", runs.METHODS, 6), runs.run(tmp_path / "two", runs.FEW, 6)]
    text = build(directories, tmp_path / "out").paths[0].read_text()
    found = Page(text)
    assert found.open == []
    assert {link[:5] if link.startswith("data:") else link[:1] for link in found.links} == {"data:", "#"}
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert "script" not in found.tags
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert found.tags.count("svg") == 6 + 5
    assert found.tags.count("img") == 2 + 1


def test_plots_stand_before_tables(tmp_path):
    directories = [runs.run(tmp_path / name, runs.METHODS, 6) for name in ("one", "two")]
    text = build(directories, tmp_path / "out").paths[0].read_text()
    *of_runs, compared = [Page(section.split("</section>")[0]).tags for section in text.split("<section ")[1:]]
    for tags in of_runs:
        found = [tag for tag in tags if tag in ("svg", "table", "dl", "details")]
        assert found == sorted(found, key=["svg", "table", "dl", "details"].index)
        assert len(set(found)) == 4
    assert {"table", "svg"} & set(compared) == {"table"}


def test_everything_is_escaped(tmp_path):
    bad = "<script>alert(1)</script> & \"quotes\" 'too' {{ 1 + 1 }}"
    methods = {"plain": {}, bad: {"drafter": "model", bad: bad}}
    tokens = {"drafted": (0, 25, 25), "tokens": (1, 2, 1)}
    lines = [
        runs.answer(bad, "plain", text=bad, prompt=bad, video=bad),
        runs.answer(bad, bad, ids=(5, 7, 8), text=f"{bad} other", prompt=bad, video=bad, **tokens),
        runs.answer("second", bad, ids=(5, 7, 8), **tokens),
        {"kind": "failure", "sample": "second", "method": "plain", "text": bad},
        {"kind": "problem", "where": bad, "text": bad},
        runs.difference(bad, bad, 1, 6, 7, 0.1) | {"plain_text": bad, "other_text": bad},
        {"kind": "overlay", "sample": bad, "method": bad, "file": "nowhere.png", "summary": bad},
    ]
    told = {"command": bad, "data": bad, "target": bad, "draft": bad, "settings": {bad: bad}, "commit": bad}
    written = build([runs.put(tmp_path / "run", runs.origin(methods, 2, **told), *lines)], tmp_path / "out")
    text = written.paths[0].read_text()
    found = Page(text)
    assert "script" not in found.tags
    assert found.open == []
    assert bad in "".join(found.texts)
    assert "{{" in text
    assert "<script" not in written.markdown.replace("\\<", "")


def test_texts_are_marked_where_they_differ(tmp_path):
    words = "the red square moves left"
    lines = [
        runs.answer("a", "plain", text=words),
        runs.answer("a", "tree", text=words),
        runs.answer("a", "verifier@0.1", ids=(5, 7, 8), text=words),
    ]
    lines += [runs.answer("b", "plain", text=words), runs.answer("b", "tree", text="the blue square moves")]
    [run] = loaded(runs.put(tmp_path, runs.origin(runs.FEW, 2), *lines))
    same = {one["method"]: one["same"] for one in page._sample(run, "a")["answers"]}
    assert same == {"plain": None, "tree": "the same words", "verifier@0.1": "the same words, of other tokens"}
    plain, tree = page._sample(run, "b")["answers"]
    assert plain["pieces"] == [(words, False)]
    assert tree["same"] is None
    assert tree["pieces"] == [("the", False), (" blue", True), (" square moves", False)]


def test_pictures_are_made_small_and_missing_ones_are_named(tmp_path):
    missing = {"kind": "overlay", "sample": "clip00", "method": "tree", "file": "none.png", "summary": "tree keeps all"}
    runs.run(tmp_path, runs.FEW, 2)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(json.dumps(missing) + "\n")
    [run] = loaded(tmp_path)
    one, other = page._sample(run, "clip00")["pictures"]
    kind, encoded = one["data"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (1200, 525)  # of 1600 by 700
    assert other == {"data": None, "caption": "tree: tree keeps all (none.png cannot be read)"}


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path):
    directories = [runs.run(tmp_path / "one", runs.METHODS, 6), runs.run(tmp_path / "two", runs.FEW, 6)]
    report = build(directories, tmp_path / "out").paths[0]
    with browser.started(tmp_path / "profile") as opened:
        for width, dark in ((1280, False), (1280, True), (400, False), (2200, False)):
            opened.open(report, width, dark=dark)
            assert opened.logs == []
            assert {url.split(":")[0] for url in opened.asked} == {"file", "data"}
            assert {url for url in opened.asked if url.startswith("file")} == {report.as_uri()}
            assert opened.value("document.documentElement.scrollWidth") <= width
            assert opened.value("document.querySelector('main').getBoundingClientRect().width") > width - 20
            plots = opened.value(
                "[...document.querySelectorAll('#run-1 .plots svg')].map(plot => "
                "plot.getBoundingClientRect()).map(place => [place.left, place.top, place.right])"
            )
            columns = {left for left, _, _ in plots}
            assert len(columns) == {400: 1, 1280: 2, 2200: 3}[width]
            assert max(right for _, _, right in plots) > 0.95 * width
            assert opened.value("[...document.images].every(image => image.naturalWidth > 0)")
        # the same page with something from outside is told apart
        report.write_text(report.read_text().replace("<main>", '<main><img src="http://example.org/x.png">'))
        opened.open(report)
        assert "Content Security Policy" in "".join(opened.logs)


# What is refused


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=re.escape('a report needs matplotlib: pip install "specvlm[bench]"')):
        build([runs.run(tmp_path / "run", runs.FEW, 2)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_runs(tmp_path):
    run = runs.run(tmp_path / "run", runs.FEW, 2)
    with pytest.raises(ConfigError, match="no run is named"):
        build([], tmp_path / "out")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'run' / '..' / 'run'} is named twice")):
        build([run, tmp_path / "run" / ".." / "run"], tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot be read"):
        build([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be written"):
        build([run], tmp_path / "file")
    old = {name: value for name, value in runs.answer("a", "plain").items() if name != "tokens_per_pass"}
    runs.put(tmp_path / "old", runs.origin(runs.FEW, 1), runs.answer("b", "plain"), old)
    with pytest.raises(ConfigError, match=r"answers\.jsonl, line 3 has no tokens_per_pass"):
        build([tmp_path / "old"], tmp_path / "out")


def test_the_package_is_imported_without_what_only_drawing_needs():
    code = "import sys, specvlm_bench.report; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_colours_can_be_told_apart_by_the_colour_blind():
    """CIE76 over 16 for any two, as they are and under Machado's matrices of full deuter-, prot- and tritanopia."""
    matrices = [
        np.eye(3),
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    coded = np.array([[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in style.COLOURS])
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for matrix in matrices:
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
        curved = np.where(seen > 216 / 24389, np.cbrt(seen), (24389 / 27 * seen + 16) / 116)
        lab = np.stack([116 * curved[:, 1] - 16, 500 * (curved[:, 0] - curved[:, 1]),
                        200 * (curved[:, 1] - curved[:, 2])], 1)  # fmt: skip
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
        assert distances[~np.eye(len(lab), dtype=bool)].min() > 16
