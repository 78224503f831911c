"""Every program of examples/ runs as it stands and prints what it is there to show."""

import re
import runpy
from pathlib import Path

import pytest

from specvlm import prune

ROOT = Path(__file__).parent.parent
START = "On a grey plain background there are 5 objects."  # of the bundled pair's text about its clip

EXPECTED = {
    "compare_lossless": r"identical: yes\nevery token the same: True\n",
    "describe": START + r"[^\n]*\n24 tokens in [4-9] target passes\n",
    "explain_decisions": r"passes? \d+.*\naccepted at depth 1, 2, \.\.\.: \[",
    "numpy_frames": r"\(0\.0, 0\.5, 1\.0, 1\.5, 2\.0, 2\.5, 3\.0, 3\.5\)\nOn a dark .* red square",
    "own_pruner": r"the draft saw 115 of 576 visual tokens\n[34]\.\d drafted tokens a round",
    "rounds": r"0: drafted 0, accepted 0: 'On'\n1: drafted 4, accepted 4: ' a grey plain background there'\n",
    "sampling": r"seed 1: (.*)\nseed 2: (?!\1\n).*\nthe same without a draft: True\n",
    "self_drafting": START + r".*\n12 of 12 drafted tokens were accepted\n",
    "several_videos": r"example\.mp4: 4 frames\n.*clip00\.mp4: 2 frames\n",
    "stream": START + r".*\n\[length\]\n",
}


@pytest.fixture(autouse=True)
def restored_pruners(monkeypatch):
    monkeypatch.setattr(prune, "PRUNERS", dict(prune.PRUNERS))


def test_every_example_is_expected():
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs_and_shows_it(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = ROOT / "examples" / f"{name}.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) < 40
    runpy.run_path(str(file), run_name="__main__")
    assert re.search(EXPECTED[name], capsys.readouterr().out)
