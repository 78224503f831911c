"""The speed bench: planted models, what its figures are made of, and what happens when something fails."""

import importlib
import json
import re
import sys
import weakref
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import media
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from specvlm import ConfigError, SpecVLM
from specvlm.cli import main as cli
from specvlm.core.config import EngineConfig
from specvlm.core.errors import CapacityError
from specvlm.core.tree import PLAIN, Shape, parse
from specvlm.engine.account import Decision
from specvlm.engine.pair import bundled
from specvlm.kernels.quant import QuantWeight, dequantize
from specvlm.runtime.model import VideoLM
from specvlm.speculate.growth import round_passes
from specvlm.speculate.pace import Costs
from specvlm.speculate.policy import Auto, Choice
from specvlm_bench import (
    answers,
    choices,
    clips,
    hardware,
    passes,
    peers,
    planted,
    plots,
    published,
    runner,
    speed,
    steps,
    summary,
)
from specvlm_bench import vllm_plain as vllm
from specvlm_bench.choices import Change, Chosen
from specvlm_bench.names import PLANTED_DRAFTS
from specvlm_bench.subjects import CheckpointSource, PlantedSource
from specvlm_bench.sweep import ENGINE_METHODS, Cell, Layers, Sweep

PAIRS = ("qwen2.5-vl-32b/7b", "qwen3-vl-8b/2b", "llava-onevision-7b/0.5b")
CPU = torch.device("cpu")
TINY = ["bench", "speed", "--tiny", "--pairs", PAIRS[0], "--visual-tokens", "64", "--tokens", "10"]
TINY += ["--repeats", "1", "--slow-repeats", "1"]


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    monkeypatch.setattr(runner, "read_rate", lambda device: 10.0)
    monkeypatch.setattr(steps, "_REPEATS", 1)


@cache
def subject(pair):
    return PlantedSource.of(pair, is_tiny=True, seed=0).load(CPU, torch.float32)


@cache
def loaded(pair, layers=None, planted_draft=None):
    """Return an engine with a planted draft of the smaller model, or of the layers that are named."""
    draft = subject(pair).draft(layers or Layers("model"))
    return SpecVLM(subject(pair).target, subject(pair).replanted(draft, planted_draft) if planted_draft else draft)


def prefilled(pair, **settings):
    model = loaded(pair)
    frames = clips.clip(model.target.hf.config, 64, CPU)
    return model.prefill(model.request(frames, clips.PROMPT, max_new_tokens=40, **settings))


@pytest.fixture(params=PAIRS)
def pair(request):
    return request.param


# Planted models


def test_every_way_of_decoding_follows_the_plant(pair):
    model, cycle, start = loaded(pair), subject(pair).cycle, prefilled(pair)
    last, accepted = int(start.inputs.input_ids[-1]), []
    for settings in ({"drafter": "none"}, {"tree": "chain:3"}, {"tree": "paper", "keep_ratio": 0.2}):
        found = passes.decode(model, start, max_new_tokens=40, **settings)
        assert len(found.token_ids) == 40
        assert cycle.follows(last, found.token_ids)
        accepted.append(found.mean_accepted_length)
    assert accepted[0] is None
    assert 1 < accepted[1] < accepted[2]
    for method in peers.PEERS:
        assert cycle.follows(last, peers.generate(model, start, method, 12).token_ids)


def test_a_text_that_leaves_the_cycle_is_noticed():
    cycle = subject(PAIRS[0]).cycle
    order = cycle.order.tolist()
    assert cycle.follows(order[0], order[1:9])
    assert cycle.follows(order[-1], order[:2])  # it has no end
    assert not cycle.follows(order[0], [order[1], order[3]])
    assert not cycle.follows(order[1], order[1:9])
    assert not cycle.follows(order[0], [order[1], 5])  # an id outside


COUNTS = {"published": [70, 12, 5, 3, 10], "hopeless": [5, 2, 1, 1, 91], "self": [90, 5, 2, 1, 2]}


@pytest.mark.parametrize("name", COUNTS)
def test_every_hundred_tokens_hold_the_ranks_as_often_as_they_should(name):
    cycle = subject(PAIRS[0]).cycle
    along = planted._draw_ranks(cycle, name, seed=0)[cycle.order - cycle.low]
    for hundred in along.view(-1, 100):
        assert torch.bincount(hundred, minlength=5).tolist() == COUNTS[name]
    assert not torch.equal(along[:100], along[100:200])


def test_a_changing_draft_changes_every_128_tokens():
    cycle = subject(PAIRS[0]).cycle
    names = ("changing", "published", "hopeless")
    changing, good, bad = (planted._draw_ranks(cycle, name, seed=0)[cycle.order - cycle.low] for name in names)
    is_good = cycle.is_good(cycle.order)
    assert is_good[:512].tolist() == ([False] * 128 + [True] * 128) * 2
    assert torch.equal(changing, torch.where(is_good, good, bad))
    assert float((changing[is_good] == 0).float().mean()) > 0.6 > 0.1 > float((changing[~is_good] == 0).float().mean())


def agreement(draft, ranks, cycle):
    """Return the share of tokens of the cycle whose successor a draft's head holds at the rank that was drawn.

    Where that is the first rank, and where it is another: the smaller of both shares.
    """
    head = dequantize(draft.head, torch.float32) if isinstance(draft.head, QuantWeight) else draft.head
    embeds = draft.hf.get_input_embeddings().weight[cycle.order]
    logits = (embeds / embeds.pow(2).mean(1, keepdim=True).sqrt()) @ head.T
    found = (logits > logits.gather(1, cycle.order.roll(-1)[:, None])).sum(1)
    drawn = ranks[cycle.order - cycle.low]
    is_right, is_first = (found.clamp_max(4) == drawn).float(), drawn == 0
    return min(float(is_right[is_first].mean()), float(is_right[~is_first].mean()))


@pytest.mark.parametrize(
    ("layers", "planted_draft"),
    [
        (Layers("model"), None),
        (Layers("model"), "hopeless"),
        (Layers("model", "int8"), "changing"),
        (Layers("self"), None),
        (Layers("self", "int8"), None),
    ],
    ids=str,
)
def test_a_draft_ranks_the_next_token_as_drawn(layers, planted_draft):
    cycle, model = subject(PAIRS[0]).cycle, loaded(PAIRS[0], layers, planted_draft)
    name = planted_draft or {"model": "published", "self": "self"}[layers.drafter]
    assert (
        agreement(model.draft, planted._draw_ranks(cycle, name, seed=0), cycle) > 0.85
    )  # at width 256 noise swaps some
    assert (model.draft.hf is model.target.hf) is (layers.drafter == "self")
    assert isinstance(model.draft.head, QuantWeight) is (layers.quant is not None)
    assert model.draft.quant == layers.quant


def test_another_head_leaves_the_model_that_it_was_planted_on_alone():
    draft = loaded(PAIRS[0]).draft
    other = loaded(PAIRS[0], None, "hopeless").draft
    assert other.decoder is not None
    cycle = subject(PAIRS[0]).cycle
    again = subject(PAIRS[0]).replanted(draft, "hopeless")
    assert again.decoder is draft.decoder
    assert again.workspaces is not draft.workspaces  # graphs hold the head that they were captured with
    assert torch.equal(again.head, other.head)
    assert not torch.equal(again.head, draft.head)
    assert agreement(draft, planted._draw_ranks(cycle, "published", seed=0), cycle) > 0.85


def test_a_planted_self_draft_follows_the_plant():
    model, start = loaded(PAIRS[0], Layers("self", "int8")), prefilled(PAIRS[0])
    found = passes.decode(model, start, max_new_tokens=40, drafter="self", tree="chain:3")
    assert subject(PAIRS[0]).cycle.follows(int(start.inputs.input_ids[-1]), found.token_ids)
    assert found.mean_accepted_length > 2
    assert found.kept_visual_tokens == 6


def test_layers_are_damped_and_the_tower_is_not():
    hf = subject(PAIRS[0]).target.hf
    layer, block = hf.model.language_model.layers[1], hf.model.visual.blocks[1]

    def ratio(one, other):
        return float(one.weight.detach().std() / other.weight.detach().std())

    assert ratio(layer.self_attn.o_proj, layer.mlp.up_proj) == pytest.approx(0.01, rel=0.05)
    assert ratio(layer.mlp.down_proj, layer.mlp.up_proj) == pytest.approx(0.01, rel=0.05)
    assert ratio(block.mlp.down_proj, block.mlp.up_proj) == pytest.approx(1, rel=0.2)


def test_equal_seeds_give_equal_weights_and_others_do_not():
    spec = published.SPECS["qwen2.5-vl-7b"].shrunk()

    def head(seed):
        model = planted.build(
            spec, cycle=planted.Cycle.of(spec, seed), device=CPU, dtype=torch.float32, seed=seed, draft="published"
        )
        return model.hf.lm_head.weight, model.hf.model.language_model.layers[0].self_attn.q_proj.weight

    state = torch.random.get_rng_state()
    first, again, other = head(1), head(1), head(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_are_those_of_a_usual_model(pair):
    spec = published.pair(pair, is_tiny=True)[0]
    config = AutoConfig.for_model(spec.model_type, **spec.config())
    usual = dict(AutoModelForImageTextToText.from_config(config, dtype=torch.float32).named_buffers())
    halves = planted._random_model(spec, CPU, torch.bfloat16, seed=0)
    assert halves.dtype == torch.bfloat16
    found = dict(halves.named_buffers())
    assert found.keys() == usual.keys()
    assert any("inv_freq" in name for name in found)
    assert all(torch.equal(found[name], usual[name]) for name in usual)  # rotary frequencies stay float32


@pytest.mark.parametrize(
    ("name", "count"),
    [  # weights of the published checkpoints, of which the three last have no head of their own
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen3-vl-8b", 8_767_123_696),
        ("qwen2.5-vl-3b", 3_754_622_976 + 151_936 * 2048),
        ("qwen3-vl-2b", 2_127_532_032 + 151_936 * 2048),
    ],
)
def test_full_size_shapes_are_the_published_ones(name, count):
    spec = published.SPECS[name]
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(spec.model_type, **spec.config()))
    assert sum(weight.numel() for weight in hf.parameters()) == count


def test_special_tokens_stand_at_their_published_ids():
    qwen, llava = published.SPECS["qwen3-vl-8b"], published.SPECS["llava-onevision-7b"]
    assert (qwen.ids["<|im_end|>"], qwen.ids["<|image_pad|>"], qwen.ids["<|video_pad|>"]) == (151645, 151655, 151656)
    assert (qwen.ids["<|vision_start|>"], llava.ids["<image>"], llava.ids["<video>"]) == (151652, 151646, 151647)


# Clips


@pytest.mark.parametrize(
    ("name", "wanted", "reached"),
    [
        ("qwen2.5-vl-32b", 4096, 4096),
        ("qwen2.5-vl-32b", 131072, 131072),
        ("qwen3-vl-8b", 16384, 16384),
        ("llava-onevision-7b", 12545, 12545),
        ("llava-onevision-7b", 25089, 25089),
        ("llava-onevision-7b", 16384, 84 * 196 + 1),
    ],
)
def test_counts_of_visual_tokens(name, wanted, reached):
    spec = published.SPECS[name]
    assert clips.reachable(AutoConfig.for_model(spec.model_type, **spec.config()), wanted) == reached


def test_a_clip_has_the_visual_tokens_that_it_should(pair):
    config, start = subject(pair).target.hf.config, prefilled(pair)
    count = int((start.inputs.input_ids == config.video_token_id).sum())
    assert count == clips.reachable(config, 64)
    assert count in (64, 65)
    frames = clips.clip(config, 64, CPU)
    assert frames.pixels.float().std() > 20  # no flat pictures


# Floors


def test_floor_by_hand():
    target = subject(PAIRS[0]).target  # 2 layers, width 256, MLP 384, 4 heads of 64, 2 of them for keys
    attention = 256 * 256 + 256 + 2 * (256 * 128 + 128) + 256 * 256
    layer = attention + 3 * 256 * 384 + 2 * 256
    weights = 4 * (2 * layer + 256 + 2048 * 256)
    assert target.step_bytes == weights
    assert hardware.kv_bytes(target, 100) == 2 * 2 * 2 * 64 * 100 * 4
    assert hardware.floor_ms(target, 100, read_gb_s=2.0) == pytest.approx((weights + 204_800) / 2e9 * 1e3)
    assert hardware.weight_bytes(target, target) == 4 * sum(weight.numel() for weight in target.hf.parameters())


def test_a_tied_head_is_read_once_and_counts():
    class Tied:
        hf, decoder = subject(PAIRS[0]).target.hf, None
        head = hf.lm_head.weight

    def step_bytes():
        return VideoLM.step_bytes.fget(Tied)

    before = step_bytes()
    own = Tied.hf.lm_head.weight
    try:
        Tied.hf.lm_head.weight = Tied.head = Tied.hf.get_input_embeddings().weight
        assert step_bytes() == before
    finally:
        Tied.hf.lm_head.weight = own


def test_a_quantised_draft_reads_its_own_bytes():
    plain, int8 = loaded(PAIRS[0]).draft, loaded(PAIRS[0], Layers("model", "int8")).draft
    dense = plain.step_bytes
    assert dense / 4 < int8.step_bytes < dense / 3.5  # of float32, beside norms, biases and scales
    # its layers were freed, but for norms and biases; the tower and the embeddings are still there
    tower = sum(weight.nbytes for weight in plain.hf.model.visual.parameters())
    table = plain.hf.get_input_embeddings().weight.nbytes
    least = tower + table + int8.step_bytes
    assert least <= hardware.weight_bytes(int8) < least + dense / 50
    both = loaded(PAIRS[0], Layers("self", "int8"))
    assert hardware.weight_bytes(both.target, both.draft) == hardware.weight_bytes(both.target) + both.draft.step_bytes


def test_the_read_rate_is_in_the_range_of_memories():
    assert 0.5 < hardware.read_rate(CPU) < 1000


def test_passes_of_the_papers_tree():
    # the head is the last two known tokens; nodes with children: 0 1 2 3, 00 01 02 10, 000, 0000
    assert round_passes(parse("paper")) == [2, 4, 4, 1, 1]
    assert round_passes(parse("chain:3")) == [2, 1, 1]


def test_steps_leave_the_session_at_the_prompts_end():
    start = prefilled(PAIRS[0])
    step = steps.verify(start, 26, read_gb_s=10.0)
    assert step.rows == 26
    assert step.floor_ms == hardware.floor_ms(start.session.model, len(start.prompt) + 26, 10.0)
    assert start.session.length == len(start.prompt)
    found = passes.decode(loaded(PAIRS[0]), start, max_new_tokens=8, drafter="none")
    assert subject(PAIRS[0]).cycle.follows(int(start.inputs.input_ids[-1]), found.token_ids)


@pytest.mark.parametrize("layers", [Layers("model", "int8"), Layers("self", "int8")], ids=str)
def test_a_drafts_passes_run_on_its_own_layers_behind_the_pruned_prompt(layers):
    model, start = loaded(PAIRS[0], layers), prefilled(PAIRS[0], keep_ratio=0.25)
    config = EngineConfig().replace(drafter=layers.drafter, keep_ratio=0.25, max_new_tokens=8)
    session = steps.draft_session(model, start, config)
    assert session.model is model.draft
    assert session.length == len(start.prompt) - 64 + 16
    step = steps.draft(session, [2, 4], read_gb_s=10.0)
    assert step.rows == 4
    assert step.floor_ms == hardware.floor_ms(model.draft, session.length + 4, 10.0)
    last, same = (one.workspace.storage[:, :, :, one.length - 1] for one in (session, start.session))
    assert (layers.drafter == "self") is (last.shape == same.shape and torch.equal(last, same))  # copied, not computed


def test_a_text_of_one_token_has_no_time_a_token():
    with pytest.raises(ValueError, match="after 1 tokens"):
        _ = passes.Pass([5], 1, 0.1).ms_per_token
    assert passes.Pass([5, 6, 7, 8, 9], 2, 0.3).ms_per_token == pytest.approx(100)  # the first two came at once


def test_spread_interpolates():
    assert speed.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == speed.Spread(3.0, 1.4, pytest.approx(4.6))
    assert speed.Spread.of([7.0]) == speed.Spread(7.0, 7.0, 7.0)


def test_cells_cross_ratios_trees_and_drafts():
    cells = Sweep(
        keep_ratios=(0.1, 0.2),
        trees=("paper", "chain:2"),
        methods=("plain", "chain", "tree", "auto", "self", "lookup"),
        draft_quants=("none", "int4"),
        planted_drafts=("published", "hopeless"),
    ).cells()
    names = [(cell.method, cell.keep_ratio, cell.tree, str(cell).split(" ", 1)[1:]) for cell in cells[:3]]
    assert names == [
        ("plain", None, None, []),
        ("chain", 0.1, "chain:2", ["chain:2 0.1 published"]),
        ("chain", 0.1, "chain:2", ["chain:2 0.1 int4 published"]),
    ]
    count = {method: sum(cell.method == method for cell in cells) for method in ENGINE_METHODS}
    assert count == {"plain": 1, "chain": 4, "tree": 4, "auto": 8, "self": 4, "lookup": 1}
    assert {cell.planted_draft for cell in cells if cell.method == "self"} == {"self"}
    drafters = {cell.method: cell.names["drafter"] for cell in cells}
    assert drafters == {"plain": None, "chain": "model", "tree": "model", "auto": "model", "self": "self",
                        "lookup": "lookup"}  # fmt: skip
    real = Sweep(methods=("tree", "auto", "self"), planted_drafts=()).cells()
    assert {cell.planted_draft for cell in real} == {None}


def test_drafts_are_grouped_by_their_layers_and_the_smaller_model_as_it_is_comes_first():
    methods = ("self", "auto", "plain", "transformers-eager", "transformers-assisted")
    groups = Sweep(methods=methods, draft_quants=("fp8", "none")).groups()
    assert [(layers, [cell.method for cell in cells]) for layers, cells in groups] == [
        (Layers("model"), ["auto", "plain", "transformers-eager", "transformers-assisted"]),
        (Layers("self", "fp8"), ["self"]),
        (Layers("self"), ["self"]),
        (Layers("model", "fp8"), ["auto"]),
    ]
    groups = Sweep(methods=("plain", "self"), draft_quants=("fp8", "int4")).groups()
    assert [(layers, len(cells)) for layers, cells in groups] == [
        (Layers("self", "fp8"), 2),
        (Layers("self", "int4"), 1),
    ]
    [(layers, _)] = Sweep(methods=("plain", "transformers-assisted")).groups()
    assert layers == Layers("model")  # generate() drafts with it, too
    assert Sweep(methods=("plain",)).groups() == [(None, [Cell("plain")])]
    assert Sweep(methods=("vllm-plain",)).groups() == []


# What a policy chose


def decision(topology, num_tokens=1, is_probe=False):
    return Decision(Choice(topology, 1.0, 1.0, 1.0, is_probe), len(topology), num_tokens)


DEEP, SHALLOW = Shape(4, 4, 16), Shape(1, 1, 3)


def test_changes_by_hand():
    is_good = [True] * 5 + [False] * 6 + [True] * 4
    texts = [
        decision(DEEP, 3),  # from token 0
        decision(DEEP, 3),  # 3
        decision(DEEP, 1),  # 6: hopeless since token 5
        decision(SHALLOW, 1),  # 7
        decision(SHALLOW, 1, is_probe=True),  # 8: followed after two rounds
        decision(PLAIN),  # 9
        decision(PLAIN),  # 10
        decision(PLAIN),  # 11: good
        decision(DEEP, 1, is_probe=True),  # 12
        decision(SHALLOW, 1),  # 13
        decision(DEEP, 1),  # 14: followed after two rounds
    ]
    assert choices.changes(is_good, texts) == [Change(False, 6, 2), Change(True, 11, 2)]
    assert choices.changes(is_good, texts[:4]) == [Change(False, 6, None)]
    assert choices.changes(is_good, texts[:1]) == choices.changes([True] * 15, texts) == []


def test_a_plain_pass_follows_at_once_where_the_draft_turns_hopeless():
    assert choices.changes([True, False, True], [decision(PLAIN)] * 3) == [Change(False, 1, 0), Change(True, 2, None)]


def test_shapes_by_share_of_passes():
    decisions = [
        decision(topology) for topology in (DEEP, PLAIN, DEEP, SHALLOW, Shape(2, 1, 4), Shape(3, 1, 4), PLAIN, DEEP)
    ]
    assert choices.shapes(decisions) == [Chosen(16, 4, 3 / 8), Chosen(3, 1, 1 / 8), Chosen(4, 2, 1 / 8)]


# The command

NUMBERS = {"visual_tokens", "end_to_end_s", "peak_gib", "weights_gib", "kv_gib", "prompt_tokens", "num_tokens"}
KEYS = NUMBERS | {
    "pair", "method", "keep_ratio", "tree", "ms_per_token", "steps", "mean_accepted_length", "ttft_s", "follows_plant",
    "is_plain", "kept_visual_tokens", "round_ms", "prefill_s", "error", "provenance", "drafter", "draft_quant",
    "planted_draft", "passes", "over_plain", "plain_share", "shapes", "changes", "once_s", "shown",
    "answer_s", "first_answer_s", "answer_over_plain",
}  # fmt: skip


def check_schema(line):
    assert set(line) == KEYS
    assert all(isinstance(line[name], int | float) and line[name] > 0 for name in NUMBERS)
    assert set(line["ms_per_token"]) == {"median", "p10", "p90"}
    assert line["ms_per_token"]["p10"] <= line["ms_per_token"]["median"] <= line["ms_per_token"]["p90"]
    assert all(set(step) == {"ms", "floor_ms", "rows"} and step["floor_ms"] > 0 for step in line["steps"].values())
    assert all(second >= 0 for second in line["ttft_s"].values())
    assert line["follows_plant"] is True
    assert line["is_plain"] is True
    assert line["error"] is None
    assert set(line["provenance"]) == {"command", "commit", "versions", "gpu", "read_gb_s"}
    assert line["provenance"]["gpu"] is None
    assert line["provenance"]["read_gb_s"] == 10.0
    assert {"torch", "transformers", "cuda"} <= set(line["provenance"]["versions"])
    later = (speed.END_TO_END_TOKENS - 1) * line["ms_per_token"]["median"] / 1e3
    assert line["end_to_end_s"] == pytest.approx(sum(line["ttft_s"].values()) + later)


def test_the_command_measures_every_method(tmp_path, capsys):
    out = tmp_path / "sub" / "speed.jsonl"
    assert cli.main([*TINY, "--trees", "paper", "chain:2", "--keep-ratios", "0.2", "--out", str(out)]) == 0
    lines = {line["method"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert [*lines] == ["plain", "chain", "tree", "auto", "lookup", *peers.PEERS, "self"]
    for line in lines.values():
        check_schema(line)
    assert set(lines["plain"]["steps"]) == {"plain"}
    assert set(lines["tree"]["steps"]) == {"verify", "draft"}
    assert lines["tree"]["steps"]["verify"]["rows"] == 26
    assert lines["tree"]["steps"]["draft"]["rows"] == 4
    assert lines["chain"]["steps"]["verify"]["rows"] == 3
    assert (lines["tree"]["keep_ratio"], lines["tree"]["kept_visual_tokens"]) == (0.2, 13)
    assert lines["plain"]["tree"] is lines["plain"]["keep_ratio"] is lines["plain"]["mean_accepted_length"] is None
    assert lines["plain"]["kept_visual_tokens"] is lines["lookup"]["kept_visual_tokens"] is None
    assert set(lines["tree"]["ttft_s"]) == {"read", "encode", "prefill", "prune", "draft_prefill"}
    assert set(lines["plain"]["ttft_s"]) == {"read", "encode", "prefill"}
    assert set(lines["transformers-eager"]["ttft_s"]) == {"read", "encode_prefill"}
    assert set(lines["plain"]["prefill_s"]) == {"unscored", "scored"}
    for method in ("auto", "self"):
        rows = {name: tuple(step["rows"] for step in found) for name, found in lines[method]["passes"].items()}
        assert rows == {"verify": steps.VERIFIED_ROWS, "draft": steps.DRAFTED_ROWS}
        assert set(lines[method]["once_s"]) == {"calibrate", "capture"}
        assert (lines[method]["drafter"], lines[method]["draft_quant"]) == (
            {"auto": "model"}.get(method, method),
            "none",
        )
    assert lines["auto"]["passes"]["verify"] == lines["self"]["passes"]["verify"]  # timed once
    assert lines["plain"]["steps"]["plain"] == lines["auto"]["passes"]["verify"][0]
    assert lines["tree"]["round_ms"] > 0
    assert lines["auto"]["round_ms"] is lines["tree"]["plain_share"] is lines["self"]["over_plain"] is None
    assert lines["plain"]["over_plain"] == 1
    shown = capsys.readouterr()
    assert "vllm-plain is left out" in shown.err
    assert "| paper keep 0.2 |" in shown.out
    assert cli.main(["bench", "speed", "--from", str(out)]) == 0
    assert capsys.readouterr().out == shown.out


def test_a_cell_that_fails_is_recorded_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    usual = passes.decode

    tried = []

    def decode(model, start, **settings):
        tried.append(settings.get("tree"))
        if settings.get("tree") == "paper":
            raise torch.OutOfMemoryError("no\nroom")
        return usual(model, start, **settings)

    monkeypatch.setattr(passes, "decode", decode)
    out = tmp_path / "speed.jsonl"
    args = [*TINY, "--methods", "tree,plain,chain", "--trees", "paper", "chain:2", "--out", str(out)]
    assert cli.main(args) == 1
    tree, plain, chain = map(json.loads, out.read_text().splitlines())
    assert (tree["error"], tree["ms_per_token"], tree["tree"]) == ("OutOfMemoryError: no", None, "paper")
    assert plain["error"] is chain["error"] is None
    assert "paper keep 0.1: OutOfMemoryError: no" in capsys.readouterr().out
    assert tried.count("paper") == 1  # and is not tried again


def test_an_interrupted_run_keeps_what_it_had(tmp_path, capsys, monkeypatch):
    usual, out = speed._prefill, tmp_path / "speed.jsonl"

    def prefill(model, shown, sweep):
        if shown.visual_tokens == 128:
            assert len(out.read_text().splitlines()) == 2  # a killed run would keep them
            raise KeyboardInterrupt
        if shown.visual_tokens == 32:
            raise torch.OutOfMemoryError("no room")
        return usual(model, shown, sweep)

    monkeypatch.setattr(speed, "_prefill", prefill)
    args = [*TINY, "--methods", "plain", "--visual-tokens", "32,64,128", "--out", str(out)]
    assert cli.main(args) == 130
    failed, measured = map(json.loads, out.read_text().splitlines())
    assert (failed["visual_tokens"], failed["error"]) == (32, "OutOfMemoryError: no room")
    assert measured["visual_tokens"] == 64
    assert "| plain |" in capsys.readouterr().out


def small(**fields):
    usual = {"visual_tokens": (64,), "num_tokens": 8, "repeats": 1, "slow_repeats": 1}
    return Sweep(**usual | fields)


def test_no_draft_outlives_its_group(monkeypatch):
    built, usual = [], subject(PAIRS[0])

    def draft(layers):
        assert all(model() is None for _, model in built)
        model = usual.draft(layers)
        built.append((layers, weakref.ref(model)))
        return model

    sweep = small(methods=("plain", "auto", "self"), draft_quants=("none", "int8"), planted_drafts=("hopeless",))
    records = list(speed.measure(replace(usual, draft=draft), sweep, 10.0, print))
    assert [record.error for record in records] == [None] * 5
    assert [layers for layers, _ in built] == [
        Layers("model"),
        Layers("model", "int8"),
        Layers("self"),
        Layers("self", "int8"),
    ]
    assert all(model() is None for _, model in built)


def test_plain_decoding_runs_beside_every_hopeless_draft(monkeypatch):
    ran, usual = [], passes.decode

    def decode(model, start, **settings):
        ran.append((settings["drafter"], model.draft.quant))
        return usual(model, start, **settings)

    monkeypatch.setattr(passes, "decode", decode)
    sweep = small(methods=("plain", "auto"), draft_quants=("none", "int8"), planted_drafts=("published", "hopeless"))
    records = list(speed.measure(subject(PAIRS[0]), sweep, 10.0, print))
    once = [("none", None), ("model", None), ("model", None)]
    again = [("none", "int8"), ("model", "int8"), ("model", "int8")]
    assert ran == once * 2 + again * 2
    assert [record.method for record in records] == ["plain", *["auto"] * 4]
    assert all(record.over_plain > 0 for record in records)
    ran.clear()
    sweep = small(methods=("auto",), planted_drafts=("hopeless",))
    [record] = speed.measure(subject(PAIRS[0]), sweep, 10.0, print)
    assert ran == once[:2] * 2
    assert record.over_plain > 0
    assert record.is_plain is True


def test_what_a_policy_chose_stands_in_the_record(monkeypatch):
    cheap = Costs({1: 10.0, 64: 11.0}, first=1.0, level={1: 1.0, 8: 1.0})
    monkeypatch.setattr("specvlm.speculate.memory.StepTimes.get", lambda self, target, draft: cheap)
    learn = Auto.learn  # from what came of rounds, not from how long they take here

    def as_they_should(self, choice, seen, num_tokens, ms):
        learn(self, choice, seen, num_tokens, cheap.round_ms(choice.topology))

    monkeypatch.setattr(Auto, "learn", as_they_should)
    monkeypatch.setattr(planted, "BLOCK", 48)
    sweep = small(methods=("auto", "self"), planted_drafts=PLANTED_DRAFTS, num_tokens=150)
    published, hopeless, changing, itself = speed.measure(subject(PAIRS[0]), sweep, 10.0, print)
    assert published.plain_share < 0.2 < 0.6 < hopeless.plain_share
    assert all(shape.depth >= 2 for shape in published.shapes)
    assert sum(shape.share for shape in published.shapes) <= 1
    assert itself.mean_accepted_length > published.mean_accepted_length
    assert published.round_ms is None  # rounds of different trees have none in common
    assert published.changes == hopeless.changes == []
    assert len(changing.changes) == 3
    for before, after in pairwise(changing.changes):
        assert before.to_good is not after.to_good
        assert after.token - before.token == pytest.approx(planted.BLOCK, abs=16)
    assert any(change.rounds is not None and change.rounds < 20 for change in changing.changes)


def test_no_prefill_outlives_the_next(monkeypatch):
    usual, sessions = SpecVLM.prefill, []

    def prefill(self, request, **options):
        assert all(session() is None for session in sessions)
        start = usual(self, request, **options)
        sessions.append(weakref.ref(start.session))
        return start

    monkeypatch.setattr(SpecVLM, "prefill", prefill)
    sweep = small(methods=("plain",), visual_tokens=(32, 64))
    records = list(speed.measure(subject(PAIRS[0]), sweep, 10.0, print))
    assert [record.error for record in records] == [None, None]
    assert len(sessions) == 8


def test_a_pair_that_does_not_load_is_recorded(monkeypatch):
    def load(source, device, dtype):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PlantedSource, "load", load)
    sweep = Sweep(methods=("plain", "tree"), visual_tokens=(64, 128))
    source = PlantedSource.of(PAIRS[0], is_tiny=True, seed=0)
    records = list(runner.run([source], sweep, CPU, torch.float32, watch=lambda text: None))
    assert [(record.visual_tokens, record.method) for record in records] == [
        (64, "plain"),
        (64, "tree"),
        (128, "plain"),
        (128, "tree"),
    ]
    assert {record.error for record in records} == {"OutOfMemoryError: no room"}


def test_text_off_the_plant_is_no_success(capsys, monkeypatch):
    monkeypatch.setattr(planted.Cycle, "follows", lambda self, previous, ids: False)
    assert cli.main([*TINY, "--methods", "plain"]) == 1
    assert "| NO |" in capsys.readouterr().out


def test_real_checkpoints_have_no_plant(tmp_path, capsys):
    out = tmp_path / "speed.jsonl"
    args = ["bench", "speed", "--target", bundled("target"), "--draft", bundled("draft"), "--visual-tokens", "64"]
    args += ["--methods", "plain,tree", "--trees", "paper", "--tokens", "8", "--repeats", "1", "--slow-repeats", "1"]
    assert cli.main([*args, "--out", str(out)]) == 0
    for line in map(json.loads, out.read_text().splitlines()):
        assert (line["follows_plant"], line["is_plain"], line["error"]) == (None, True, None)
    assert "The models were shown: random smooth frames, no film." in capsys.readouterr().out


def test_real_checkpoints_are_shown_films(tmp_path, capsys):
    """Each film is a table of its own, and what cannot be read fails by itself."""
    film, other, bad = tmp_path / "film.mp4", tmp_path / "other.mp4", tmp_path / "bad.mp4"
    media.make_video(film, 8, rate=2)
    media.make_video(other, 8, rate=2)
    bad.write_bytes(b"no film")
    args = ["bench", "speed", "--target", bundled("target"), "--draft", bundled("draft"), "--methods", "plain"]
    args += ["--clips", str(film), str(other), str(bad), "--tokens", "2", "--repeats", "1", "--slow-repeats", "1"]
    assert cli.main([*args, "--out", str(tmp_path / "speed.jsonl")]) == 1
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["shown"] for line in lines] == [str(film), str(other), str(bad)]
    assert [line["error"] is None for line in lines] == [True, True, False]
    assert lines[0]["visual_tokens"] > 0
    out = capsys.readouterr().out
    assert (
        f"/ {bundled('draft')}, film.mp4, {lines[0]['visual_tokens']} visual tokens\n\nThe models were shown: {film}."
        in out
    )


# Whole answers

ANSWERS = ["bench", "speed", "--tiny", "--pairs", PAIRS[0], "--visual-tokens", "64", "--answer-tokens", "1,12"]


def test_whole_answers_are_timed_in_turn_from_the_frames_on(tmp_path, capsys, monkeypatch):
    asked, usual = [], SpecVLM.generate

    def generate(self, frames, prompt, **settings):
        draft = self.draft and self.draft.quant
        asked.append((settings["max_new_tokens"], settings["drafter"], draft, type(frames).__name__))
        return usual(self, frames, prompt, **settings)

    monkeypatch.setattr(SpecVLM, "generate", generate)
    monkeypatch.setattr(SpecVLM, "prefill", counted := Counted(SpecVLM.prefill))
    out = tmp_path / "answers.jsonl"
    assert cli.main([*ANSWERS, "--repeats", "2", "--draft-quants", "none,int8", "--out", str(out)]) == 0
    one = [(count, drafter, None, "Frames") for count in (1, 12) for drafter in ("none", "model")]
    assert asked == one * 3 + [(count, drafter, "int8", "Frames") for count, drafter, *_ in one] * 3
    assert counted.calls == len(asked)  # nothing else was prefilled, so the first answer is the process's first
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [(line["num_tokens"], line["method"], line["draft_quant"]) for line in lines]
    both = [(count, method, "none" if method == "auto" else None) for count in (1, 12) for method in ("plain", "auto")]
    assert names == [*both, (1, "auto", "int8"), (12, "auto", "int8")]
    for line in lines:
        assert set(line) == KEYS
        assert (line["visual_tokens"], line["ms_per_token"], line["error"]) == (64, None, None)
        assert line["follows_plant"] is line["is_plain"] is True
        assert set(line["answer_s"]) == set(line["answer_over_plain"]) == {"median", "p10", "p90"}
        assert line["answer_s"]["median"] > 0 < line["first_answer_s"]
        assert {"command", "commit", "versions", "gpu", "read_gb_s"} == set(line["provenance"])
    assert lines[0]["answer_over_plain"] == {"median": 1, "p10": 1, "p90": 1}
    shown = capsys.readouterr().out
    assert "64 visual tokens: whole answers" in shown
    assert "| 12 | auto keep 0.1 int8 |" in shown
    assert cli.main(["bench", "speed", "--from", str(out)]) == 0
    assert capsys.readouterr().out == shown


class Counted:
    """A method that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __get__(self, owner, kind=None):
        def call(*args, **settings):
            self.calls += 1
            return self.function(owner, *args, **settings)

        return call


def test_shares_of_plain_are_of_the_same_round():
    row, plain = (answers._Row(seconds=seconds) for seconds in ([1.0, 3.0, 2.0], [2.0, 3.0, 8.0]))
    assert answers._over(row, plain) == speed.Spread.of([0.5, 1.0, 0.25])
    assert answers._over(row, None) is answers._over(row, answers._Row(problem="x")) is None


def test_an_answer_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    usual = SpecVLM.generate

    def generate(self, frames, prompt, **settings):
        if settings["max_new_tokens"] == 3 and settings["drafter"] == "model":
            raise torch.OutOfMemoryError("no room")
        return usual(self, frames, prompt, **settings)

    monkeypatch.setattr(SpecVLM, "generate", generate)
    sweep = small(methods=("auto",), answer_tokens=(3, 4))
    failed, measured = answers.measure(subject(PAIRS[0]), sweep, print)
    assert (failed.error, failed.visual_tokens) == ("3 tokens: OutOfMemoryError: no room", 64)
    assert measured.answer_s.median > 0
    assert measured.answer_over_plain is measured.is_plain is None  # plain decoding was not asked for


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--answer-tokens", "8,x"], "answer_tokens='8,x' is not allowed: write numbers"),
        (["--answer-tokens", "0"], "answer_tokens=0 is not allowed: at least 1"),
        (["--answer-tokens", "8", "--tokens", "9"], "tokens=9 is not allowed beside --answer-tokens"),
        (["--answer-tokens", "8", "--slow-repeats", "9"], "slow_repeats=9 is not allowed beside --answer-tokens"),
        (["--answer-tokens", "8", "--plots", "x"], "plots=x is not allowed beside --answer-tokens"),
        (["--answer-tokens", "8", "--methods", "plain,vllm-plain"], "'vllm-plain' is not allowed for whole answers"),
        (["--pairs", "qwen2.5-vl-32b"], "pair 'qwen2.5-vl-32b' is not known: write TARGET/SIZE"),
        (["--pairs", "qwen2.5-vl-32b/2b"], "is not known"),
        (["--pairs", PAIRS[0], "--target", "x", "--draft", "y"], "leave one of them out"),
        (["--target", "x"], "give both --target and --draft"),
        (["--visual-tokens", "4k"], "visual_tokens='4k' is not allowed: write numbers"),
        (["--visual-tokens", "0"], "visual_tokens=0 is not allowed: at least 1"),
        (["--keep-ratios", "0"], "keep_ratio=0.0 is not allowed"),
        (["--trees", "bush"], "tree='bush' is not allowed"),
        (["--methods", "plain,fast"], "method 'fast' is not known: choose from plain, chain"),
        (["--tokens", "1"], "num_tokens=1 is not allowed: at least 2"),
        (["--repeats", "0"], "repeats=0 is not allowed: at least 1"),
        (["--draft-quants", "fp4"], "draft_quant 'fp4' is not known: choose from none, fp8, int8, int4"),
        (
            ["--planted-drafts", "lucky"],
            "planted_draft 'lucky' is not known: choose from published, hopeless, changing",
        ),
        (["--draft-quants", "none,int4", "--device", "cpu"], "draft_quant='int4' has no kernel for cpu: choose int8"),
        (["--target", "x", "--draft", "y", "--planted-drafts", "hopeless"], "is not allowed beside --target"),
        (["--clips", "x.mp4"], "clips='x.mp4' is not allowed for planted pairs: give --target and --draft"),
        (["--target", "x", "--draft", "y", "--clips", "x.mp4"], "'x.mp4' does not exist"),
        (["--target", "x", "--draft", "y", "--clips", "x.mp4", "--visual-tokens", "9"], "not allowed beside --clips"),
        (["--device", "abacus"], "device='abacus' is not served"),
        (["--from", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    ],
)
def test_what_is_not_allowed_is_said_on_one_line(args, message, capsys):
    assert cli.main(["bench", "speed", *args]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_results_that_cannot_be_written_or_read(tmp_path, capsys):
    assert cli.main([*TINY, "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    file = tmp_path / "lines.jsonl"
    file.write_text('{"pair": 1}\n')
    with pytest.raises(ConfigError, match=r"lines.jsonl, line 1 is no result of bench speed"):
        summary.read([str(file)])


# vLLM, for which a fake stands in


FAKE = """
__version__ = "0.fake"
import json, time
from pathlib import Path
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0.0 and ignore_eos and not detokenize
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, max_model_len, load_format, **options):
        config = json.loads((Path(model) / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForCausalLM"] and load_format == "dummy"
        assert not options["enable_prefix_caching"]
        if config["hidden_size"] == 5120:
            raise RuntimeError("too large")
        self.longest = max_model_len
    def generate(self, prompts, sampling, use_tqdm):
        assert len(prompts[0]["prompt_token_ids"]) + sampling.max_tokens <= self.longest
        time.sleep(0.02 + 0.005 * sampling.max_tokens)
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_vllms_time_a_token_leaves_the_prefill_out(fake_vllm):
    assert vllm.is_installed(sys.executable)
    config = PlantedSource.of(PAIRS[0], is_tiny=True, seed=0).config()
    found = vllm.measure(config, "float32", [128, 192], num_tokens=9, repeats=2)
    assert found["version"] == "0.fake"
    record = runner.vllm_record("a/b", 64, found["prompts"][0], 9)
    assert record.prompt_tokens == 128
    assert record.ms_per_token.median == pytest.approx(5, rel=0.5)
    assert record.ttft_s["prefill"] == pytest.approx(0.025, rel=0.5)


def test_vllms_figures_by_hand():
    times = {"prompt_tokens": 128, "first_s": [1.0, 2.0, 1.5], "all_s": [1.8, 2.4, 2.1]}
    record = runner.vllm_record("a/b", 64, times, num_tokens=5)
    assert record.ms_per_token.median == pytest.approx(150)  # of 200, 100 and 150
    assert record.ttft_s == {"prefill": 1.5}
    assert record.end_to_end_s == pytest.approx(1.5 + 255 * 0.15)


def test_vllms_failure_is_one_line(fake_vllm):
    config = PlantedSource.of(PAIRS[0], is_tiny=False, seed=0).config()
    with pytest.raises(CapacityError, match="ended with status 1: RuntimeError: too large"):
        vllm.measure(config, "float32", [128], num_tokens=9, repeats=1)


def test_vllm_without_an_interpreter_or_a_model_stops_nothing(monkeypatch):
    assert not vllm.is_installed("/nowhere/python")
    monkeypatch.setattr(vllm, "is_installed", lambda python: True)
    args = (CheckpointSource("/nowhere", "x"), Sweep(), torch.device("cuda"), torch.bfloat16, print, "python")
    [record] = runner._vllm(*args)
    assert (record.method, record.visual_tokens) == ("vllm-plain", 16384)
    assert "/nowhere" in record.error


def test_vllm_gets_the_language_shapes():
    source = PlantedSource.of(PAIRS[1], is_tiny=False, seed=0)
    config = vllm.language_config(source.config())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    shapes = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "rope_theta")
    assert [config[name] for name in shapes] == [4096, 36, 8, 128, 151936, 5e6]
    assert vllm.is_installed(sys.executable) is (importlib.util.find_spec("vllm") is not None)


# Plots


def line(method, visual_tokens, ms, tree=None):
    """Return a line as it was before drafts had names and bits."""
    step = {"ms": ms, "floor_ms": ms / 2, "rows": 1}
    return {
        "pair": "a/b", "method": method, "visual_tokens": visual_tokens, "keep_ratio": tree and 0.1, "tree": tree,
        "ms_per_token": {"median": ms, "p10": ms, "p90": ms}, "steps": {"plain": step} if tree is None else {},
        "ttft_s": {"read": 0.1, "prefill": 1.0}, "provenance": {"gpu": None, "read_gb_s": 10.0, "command": "x"},
    }  # fmt: skip


LINES = [line(*args) for args in (("plain", 64, 4.0), ("plain", 128, 5.0), ("tree", 64, 2.0, "paper"))]


def test_speedup_is_over_plain_decoding_of_the_same_length():
    assert [summary.speedup(one, LINES) for one in LINES] == [1.0, 1.0, 2.0]
    assert summary.speedup(line("tree", 32, 2.0, "paper"), LINES) is None
    assert "| paper keep 0.1 | 2.00 (2.00 to 2.00) | 2.00 |" in summary.table(LINES)


def chosen(quant, drafter="model", **fields):
    step = {"ms": 3.0, "floor_ms": 2.0, "rows": 8}
    names = {"keep_ratio": 0.1, "drafter": drafter, "draft_quant": quant, "planted_draft": "published"}
    passes = {"verify": [step | {"rows": 1}, step], "draft": [step]}
    shapes = [{"nodes": 15, "depth": 4, "share": 0.6}]
    return line("auto", 64, 1.0) | names | {"passes": passes, "plain_share": 0.25, "shapes": shapes} | fields


def test_columns_and_passes_of_chosen_trees():
    changes = [
        {"to_good": good, "token": 1, "rounds": rounds} for good, rounds in ((False, 2), (True, 1), (False, None))
    ]
    more = [
        chosen("none"),
        chosen("fp8", planted_draft="changing", changes=changes),
        chosen("int4", "self", planted_draft="hopeless", over_plain=1.0123),
    ]
    old = summary.table(LINES)
    assert "chosen" not in old
    assert "by rows" not in old
    page = summary.table([*LINES, *more])
    assert "| auto keep 0.1 | 1.00 (1.00 to 1.00) | 4.00 |" in page
    assert "| plain 25%, 15/4 60% |  |  |\n" in page
    assert "| auto keep 0.1 fp8 changing |" in page
    assert "|  | hopeless 2 -, good 1 |\n" in page
    assert "| 1.012 |  |\n" in page
    assert page.endswith(
        "| pass, ms (x floor), by rows | 1 | 8 |\n|---|---|---|\n| target | 3.00 (1.50x) | 3.00 (1.50x) |\n"
        "| draft |  | 3.00 (1.50x) |\n| draft fp8 |  | 3.00 (1.50x) |\n| self int4 |  | 3.00 (1.50x) |\n\n"
        "## a/b, 128 visual tokens\n\n" + page.split("## a/b, 128 visual tokens\n\n")[1]
    )
    assert "time over plain" not in summary.table([*LINES, chosen("none", over_plain=0.5)])


@pytest.mark.parametrize("name", ["speed-32b", "speed-small"])
def test_results_of_before_drafts_had_bits_can_be_read(name):
    file = Path(__file__).parents[1] / "results" / "h200" / f"{name}.jsonl"
    assert "| paper keep 0.1 |" in summary.table(summary.read([str(file)]))


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    failed = line("tree", 128, 1.0, "paper") | {"ms_per_token": None, "error": "x"}
    files = plots.draw([*LINES[::2], failed], str(tmp_path / "plots"))
    assert [file.name for file in files] == ["a-b-speed.png", "a-b-stages.png", "a-b-steps.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def committed():
    """Return the lines that `make plots` draws, and what it calls the plots."""
    root = Path(__file__).parents[1]
    command = re.search(r"^plots:.*?\n\n", (root / "Makefile").read_text(), re.M | re.S)[0]
    names = re.findall(r"results/h200/[\w.-]+\.jsonl", command)
    return summary.read([str(root / name) for name in names]), re.findall(r"docs/plots/([\w.-]+)", command)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw without writing; return the figures by the names of their files."""
    figure = pytest.importorskip("matplotlib.figure").Figure

    def draw(lines):
        found = {}
        monkeypatch.setattr(figure, "savefig", lambda self, file, **options: found.setdefault(file.name, self))
        plots.draw(lines, str(tmp_path))
        return found

    return draw


def shown(axes):
    """Return the bars of a panel, (name, length) from the top, and their texts."""
    names = [text.get_text() for text in axes.get_yticklabels()]
    lengths = [round(bar.get_width(), 2) for bar in axes.patches]
    return list(zip(names, lengths, strict=True)), [text.get_text().split() for text in axes.texts]


def test_one_command_makes_every_committed_plot_and_the_headline_is_sorted_in_words_and_cut(drawn):
    lines, copied = committed()
    found = drawn(lines)
    assert {*found, *copied} == {file.name for file in (Path(__file__).parents[1] / "docs/plots").iterdir()}
    [axes] = found["qwen2.5-vl-32b-7b-speed.png"].axes
    bars, texts = shown(axes)
    assert bars[0] == ("specvlm: chosen trees, int4 draft", 7.55)
    assert texts[0] == ["7.55", "(2.32x)"]  # over plain decoding of the same run, 17.49
    assert texts[-1] == ["146.6", "(0.12x)"]
    lengths = [length for _, length in bars]
    assert lengths == sorted(lengths)
    assert lengths[-1] == pytest.approx(1.15 * 43.56, abs=0.01)
    assert axes.get_xlim()[1] < 70
    cuts = [mark for mark in axes.lines if mark.get_gid() == "cut"]
    assert [round(float(np.mean(mark.get_ydata()))) for mark in cuts] == [len(bars) - 1] * 2
    names = [name for name, _ in bars]
    assert len(set(names)) == len(names)
    assert {"specvlm: plain decoding", "specvlm: the paper's tree", "vLLM, language model alone"} < set(names)
    assert not [name for name in names if re.search(r"auto|vllm-|-eager|-static|-assisted|keep 0|hopeless", name)]


def test_nothing_is_cut_where_bars_can_be_compared(drawn):
    lines = [line("plain", 64, 4.0), line("tree", 64, 2.0, "paper"), line("transformers-eager", 64, 19.0)]
    [axes] = drawn(lines)["a-b-speed.png"].axes
    assert [length for _, length in shown(axes)[0]] == [2.0, 4.0, 19.0]
    assert not axes.lines


def test_two_lengths_have_a_panel_each_and_more_are_lines(drawn):
    figure = drawn(LINES)["a-b-speed.png"]
    assert [axes.get_title() for axes in figure.axes] == ["64 visual tokens", "128 visual tokens"]
    assert [shown(axes)[0] for axes in figure.axes] == [
        [("specvlm: the paper's tree", 2.0), ("specvlm: plain decoding", 4.0)],
        [("specvlm: plain decoding", 5.0)],
    ]
    times, gains = drawn([*LINES, line("plain", 256, 6.0)])["a-b-speed.png"].axes
    assert times.lines[0].get_xdata().tolist() == [64, 128, 256]
    assert gains.lines[1].get_ydata().tolist() == [2.0]


def test_keep_ratios_are_named_where_they_differ(drawn):
    other = line("tree", 64, 3.0, "paper") | {"keep_ratio": 0.25}
    [axes] = drawn([*LINES[::2], other])["a-b-speed.png"].axes
    assert [name for name, _ in shown(axes)[0]] == [
        "specvlm: the paper's tree, 10% of the video",
        "specvlm: the paper's tree, 25% of the video",
        "specvlm: plain decoding",
    ]


def test_speedup_is_over_plain_decoding_of_the_same_run():
    run = {"provenance": {"gpu": None, "read_gb_s": 10.0, "command": "y"}}
    lines = [*LINES, line("plain", 64, 8.0) | run, line("auto", 64, 2.0) | run]
    assert [summary.speedup(one, lines) for one in lines] == [1.0, 1.0, 2.0, 1.0, 4.0]
    assert summary.table(lines).startswith("CPU, 10 GB/s read. Made by `x`.\n\nCPU, 10 GB/s read. Made by `y`.\n")


def test_stages_are_in_the_order_of_time(drawn):
    lines = [line("vllm-plain", 64, 5.0) | {"ttft_s": {"prefill": 0.5}}, LINES[0]]
    figure = drawn([*lines, chosen("fp8")])["a-b-stages.png"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["read the video", "prefill"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "vLLM, language model alone",
        "specvlm: plain decoding",
        "specvlm: chosen trees, fp8 draft",
    ]


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*TINY, "--plots", "plots"]) == 2
    assert 'plots need matplotlib: pip install "specvlm[bench]"' in capsys.readouterr().err
