"""The steps of CONTRIBUTING.md lead where they say: its files work as they stand, its paths and targets exist."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import tiny
import torch

from specvlm import SpecVLM, prune
from specvlm.cli import main as cli
from specvlm.families import Family
from specvlm.speculate.drafters import DRAFTERS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CLIP = ROOT / "src/specvlm/bundled/clips/example.mp4"


@pytest.fixture
def files():
    """Run the two files of the page, and forget what they register."""
    found = [textwrap.dedent(block) for block in re.findall(r"^   ```python\n(.*?)^   ```$", TEXT, re.M | re.S)]
    assert len(found) == 2
    for block in found:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {})
    yield
    prune.PRUNERS.pop("latest")
    DRAFTERS.pop("echo")


def test_a_pruner_in_three_steps(files, tmp_path, run):
    grid = torch.tensor([[time, 0, 0] for time in range(6)])
    assert prune.get("latest")(torch.zeros(6), grid, 2).tolist() == [4, 5]
    picture = tmp_path / "kept.png"
    assert run("inspect", CLIP, "-o", picture, "--pruner", "latest", "--num-frames", "4")[0] == 0
    assert picture.exists()


def test_a_drafter_in_three_steps(files):
    model = SpecVLM.from_pretrained(drafter="echo", tree="chain:1", num_frames=4, max_new_tokens=8)
    echoed = model.generate(CLIP, "What happens?")
    assert echoed.speculation.drafted_tokens > 0
    assert echoed.token_ids == model.generate(CLIP, "What happens?", drafter="none").token_ids


def test_the_names_of_the_family_steps_exist():
    assert set(tiny.FAMILIES) >= {"llava_onevision", "qwen2_vl"}
    assert {"inputs", "encode_visual", "merge"} <= vars(Family).keys()


def test_every_kernel_has_its_triton_file_and_its_reference():
    folder = ROOT / "src/specvlm/kernels"
    for file in folder.glob("*_triton.py"):
        launcher = folder / file.name.replace("_triton", "")
        assert re.search(r"def \w*reference", launcher.read_text(encoding="utf-8")), launcher.name


def test_paths_and_targets_exist():
    paths = set(re.findall(r"`((?:src|tests|docs)/[\w./]+)`", TEXT))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {word for words in re.findall(r"(?:`|^)make ([a-z -]+?)(?:`|  )", TEXT, re.M) for word in words.split()}
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.M)} == set()
    assert len(targets) >= 4


@pytest.mark.parametrize("command", re.findall(r"`specvlm (\w+ -?[^`]+)`", TEXT))
def test_commands_are_parsed(command, files):
    assert cli._parse(shlex.split(command)).run
