"""The bundled pair on its 40 held-out mp4 clips: word for word plain decoding and transformers' generate().

A clip takes two methods in turn, so that every pruner, ratio and tree meets several clips; the whole product is
measured by `make studies` and stands in docs/studies.md.
"""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch

from specvlm import SpecVLM, prune
from specvlm.core.rows import Rows
from specvlm.engine.pair import bundled
from specvlm.speculate import growth
from specvlm_bench import data, quality
from specvlm_bench.journal import Journal
from specvlm_bench.methods import METHODS
from training.data import positions

SWEEP = [
    {"drafter": "model", "policy": "fixed", "tree": tree, "keep_ratio": keep_ratio, "pruner": pruner}
    for tree, keep_ratio, pruner in itertools.product(("paper", "chain:5"), (0.1, 1.0), prune.PRUNERS)
]
PER_CLIP = 2


@cache
def model():
    return SpecVLM.from_pretrained(device="cpu")


@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] if n % 8 else []) for n in range(40)])
def test_ids_are_those_of_plain_decoding_and_of_transformers(number, tmp_path):
    clips = data.read()
    assert len(clips.samples) == 40
    mine = [SWEEP[(PER_CLIP * number + i) % len(SWEEP)] for i in range(PER_CLIP)]
    methods = {name: METHODS[name] for name in ("plain", "generate")} | {str(settings): settings for settings in mine}
    protocol = quality.Protocol(methods, {}, is_timed=False, num_overlays=0)
    one = data.Data("bundled", clips.samples[number : number + 1], ())
    with Journal(tmp_path, quality.origin(model(), one, protocol)) as journal:
        lines = quality.run(model(), one, protocol, journal)
    answers = {line["method"]: line for line in lines if line["kind"] == "answer"}
    assert answers.keys() == methods.keys()
    plain = answers.pop("plain")
    assert plain["new_tokens"] > 20
    assert answers.pop("generate")["token_ids"] == plain["token_ids"]
    for answer in answers.values():
        assert answer["token_ids"] == plain["token_ids"], answer
        assert answer["target_passes"] < answer["new_tokens"]


@pytest.mark.parametrize("number", [0, 4])  # 16 and 64 frames
def test_the_pair_stands_where_it_was_trained(number):
    sample = data.read().samples[number]
    inputs = model().read(model().request(sample.video, sample.prompt))
    (visual,) = inputs.visuals
    is_video = (inputs.input_ids == model().target.hf.config.video_token_id).numpy()
    wanted = positions(is_video, visual.grid[0], len(is_video))
    for part in (model().target, model().draft):
        found = part.family.positions(part.hf, inputs)
        assert found[:, 0].tolist() == wanted.tolist()


def test_the_pair_shares_a_tokenizer_and_is_small():
    parts = model().target, model().draft
    sizes = [sum(weight.numel() for weight in part.hf.parameters()) for part in parts]
    assert 10e6 <= sizes[0] <= 30e6
    assert 1e6 <= sizes[1] <= 4e6
    files = [Path(bundled(name), "model.safetensors") for name in ("target", "draft")]
    assert sum(file.stat().st_size for file in files) < 64e6
    assert all(part.hf.dtype == torch.float32 for part in parts)


def test_the_mask_fault_of_the_authors_code_costs_acceptance_and_no_word(monkeypatch):
    """Where one node alone opens a level, their mask hides nothing: it sees its siblings, too. Draft = target."""
    same = SpecVLM(model().target, model().target)
    sample = data.read().samples[20]
    usual, is_faulty = growth.Growth.run_next, False

    def run_next(self, level):
        tokens, rows = usual(self, level)
        if is_faulty and len(tokens) == 1:
            rows = Rows.that_see(torch.ones_like(rows.sees))
        return tokens, rows

    monkeypatch.setattr(growth.Growth, "run_next", run_next)
    settings = {"tree": "paper", "policy": "fixed", "keep_ratio": 1.0}
    right = same.generate(sample.video, sample.prompt, **settings)
    is_faulty = True
    wrong = same.generate(sample.video, sample.prompt, **settings)
    assert wrong.token_ids == right.token_ids
    rounds, depths = right.speculation.rounds, right.speculation.accepted_per_depth
    assert depths == [rounds] * 5  # the target agrees with itself, always
    assert wrong.speculation.mean_accepted_length < 4.7
