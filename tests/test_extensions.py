"""Policies and families of a program's own: one decorator each, and nothing else is edited."""

import json

import pytest
import tiny
from conftest import load
from media import make_video

from specvlm import ConfigError, SpecVLM, family, policy
from specvlm.core.tree import parse
from specvlm.families import base, family_for
from specvlm.families.qwen_vl import QwenVL
from specvlm.runtime.model import VideoLM
from specvlm.speculate import policy as policies
from specvlm.speculate.policy import Fixed

PROMPT = "What happens in the video?"
MINE = """
from specvlm import policy
from specvlm.core.tree import parse
from specvlm.speculate.policy import Fixed

@policy("short")
def short(topologies, acceptance):
    return Fixed(parse("chain:2"), acceptance)
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    monkeypatch.setattr("specvlm.engine.drafts.POLICIES", policies.POLICIES)
    monkeypatch.setattr(base, "_FAMILIES", dict(base._FAMILIES))


def test_a_policy_chooses_what_every_round_drafts(pair):
    offered = []

    @policy("mine")
    def make(topologies, acceptance):
        offered.extend(topologies)
        return Fixed(parse("chain:2"), acceptance)

    plain = pair.generate(tiny.video(4), PROMPT, max_new_tokens=24, ignore_eos=True, drafter="none")
    answer = pair.generate(tiny.video(4), PROMPT, max_new_tokens=24, ignore_eos=True, policy="mine")
    assert answer.token_ids == plain.token_ids
    assert offered
    assert {decision.num_drafted for decision in answer.decisions} <= {0, 1, 2}
    assert answer.speculation.rounds > 5


def test_a_policy_that_nobody_registered_is_refused(pair):
    with pytest.raises(ConfigError, match="policy='bogus' is not allowed: known are auto, fixed"):
        pair.generate(tiny.video(4), PROMPT, policy="bogus")


def test_a_file_of_ones_own_brings_a_policy_to_the_command_line(run, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    clip = str(make_video(tmp_path / "clip.mp4", 8))
    models = ["--target", tiny.checkpoint("qwen2_5_vl", "target"), "--draft", tiny.checkpoint("qwen2_5_vl", "near")]
    settings = ["--load", str(tmp_path / "mine.py"), "--policy", "short", "--max-new-tokens", "8", "--json"]
    status, out, _ = run("describe", clip, *models, *settings)
    assert (status, json.loads(out)["config"]["draft"]["policy"]) == (0, "short")


def test_a_family_serves_the_model_type_that_it_names():
    @family("qwen2_5_vl")
    class Mine(QwenVL):
        """Qwen2.5-VL under another class."""

    assert family_for("qwen2_5_vl") is Mine
    loaded = VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl", "target"), device="cpu")
    assert type(loaded.family) is Mine
    mine, usual = SpecVLM(loaded, None), SpecVLM(load("qwen2_5_vl", "target"), None)
    answers = [model.generate(tiny.video(4), PROMPT, max_new_tokens=8).token_ids for model in (mine, usual)]
    assert answers[0] == answers[1]
