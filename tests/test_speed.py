"""The speed bench: planted models, what its figures are made of, and what happens when something fails."""

import importlib
import json
import sys
import weakref
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from specvlm import ConfigError, SpecVLM, cli
from specvlm.bench import clips, hardware, passes, peers, planted, plots, published, runner, speed, steps, summary
from specvlm.bench import vllm_plain as vllm
from specvlm.bench.subjects import CheckpointSource, PlantedSource
from specvlm.draft import round_passes
from specvlm.engine import bundled
from specvlm.errors import CapacityError
from specvlm.tree import parse

PAIRS = ("qwen2.5-vl-32b/7b", "qwen3-vl-8b/2b", "llava-onevision-7b/0.5b")
CPU = torch.device("cpu")
TINY = ["bench", "speed", "--tiny", "--pairs", PAIRS[0], "--visual-tokens", "64", "--tokens", "10"]
TINY += ["--repeats", "1", "--slow-repeats", "1"]


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    monkeypatch.setattr(runner, "read_rate", lambda device: 10.0)


@cache
def subject(pair):
    return PlantedSource.of(pair, is_tiny=True, seed=0).load(CPU, torch.float32)


def prefilled(pair, **settings):
    model = subject(pair).model
    frames = clips.clip(model.target.hf.config, 64, CPU)
    return model.prefill(model.request(frames, clips.PROMPT, max_new_tokens=40, **settings))


@pytest.fixture(params=PAIRS)
def pair(request):
    return request.param


# Planted models


def test_every_way_of_decoding_follows_the_plant(pair):
    model, cycle, start = subject(pair).model, subject(pair).cycle, prefilled(pair)
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


def test_the_draft_ranks_the_next_token_as_drawn():
    cycle, draft = subject(PAIRS[0]).cycle, subject(PAIRS[0]).model.draft.hf
    drawn = planted._draw_ranks(cycle, seed=0)
    along = drawn[cycle.order - cycle.low]
    for hundred in along.view(-1, 100):
        assert torch.bincount(hundred, minlength=5).tolist() == [70, 12, 5, 3, 10]
    assert not torch.equal(along[:100], along[100:200])
    embeds = draft.get_input_embeddings().weight[cycle.order]
    logits = draft.lm_head(embeds / embeds.pow(2).mean(1, keepdim=True).sqrt())
    target = cycle.order.roll(-1)
    ranks = (logits > logits.gather(1, target[:, None])).sum(1)
    agreement = (ranks.clamp_max(4) == along).float().mean()
    assert agreement > 0.85  # at width 256 noise swaps some neighbours


def test_layers_are_damped_and_the_tower_is_not():
    hf = subject(PAIRS[0]).model.target.hf
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
            spec, cycle=planted.Cycle.of(spec, seed), device=CPU, dtype=torch.float32, seed=seed, is_draft=True
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
    config, start = subject(pair).model.target.hf.config, prefilled(pair)
    count = int((start.inputs.input_ids == config.video_token_id).sum())
    assert count == clips.reachable(config, 64)
    assert count in (64, 65)
    frames = clips.clip(config, 64, CPU)
    assert frames.pixels.float().std() > 20  # no flat pictures


# Floors


def test_floor_by_hand():
    target = subject(PAIRS[0]).model.target  # 2 layers, width 256, MLP 384, 4 heads of 64, 2 of them for keys
    attention = 256 * 256 + 256 + 2 * (256 * 128 + 128) + 256 * 256
    layer = attention + 3 * 256 * 384 + 2 * 256
    weights = 4 * (2 * layer + 256 + 2048 * 256)
    assert hardware.step_bytes(target) == weights
    assert hardware.kv_bytes(target, 100) == 2 * 2 * 2 * 64 * 100 * 4
    assert hardware.floor_ms(target, 100, read_gb_s=2.0) == pytest.approx((weights + 204_800) / 2e9 * 1e3)
    assert hardware.weight_bytes(target, target) == 4 * sum(weight.numel() for weight in target.hf.parameters())


def test_a_tied_head_is_read_once_and_counts():
    class Tied:
        hf = subject(PAIRS[0]).model.target.hf

    before = hardware.step_bytes(Tied)
    own = Tied.hf.lm_head.weight
    try:
        Tied.hf.lm_head.weight = Tied.hf.get_input_embeddings().weight
        assert hardware.step_bytes(Tied) == before
    finally:
        Tied.hf.lm_head.weight = own


def test_the_read_rate_is_in_the_range_of_memories():
    assert 0.5 < hardware.read_rate(CPU) < 1000


def test_passes_of_the_papers_tree():
    # rows 0 and 1 are the last two known tokens; nodes with children: 0 1 2 3, 00 01 02 10, 000, 0000
    assert round_passes(parse("paper")) == [(-1, 0), (1, 1, 1, 1), (2, 2, 2, 3), (6,), (10,)]
    assert round_passes(parse("chain:3")) == [(-1, 0), (1,), (2,)]


def test_steps_leave_the_session_at_the_prompts_end():
    start = prefilled(PAIRS[0])
    step = steps.verify(start, "paper", read_gb_s=10.0)
    assert step.rows == 26
    assert step.floor_ms == hardware.floor_ms(start.session.model, len(start.prompt) + 26, 10.0)
    assert start.session.length == len(start.prompt)
    found = passes.decode(subject(PAIRS[0]).model, start, max_new_tokens=8, drafter="none")
    assert subject(PAIRS[0]).cycle.follows(int(start.inputs.input_ids[-1]), found.token_ids)


def test_a_text_of_one_token_has_no_time_a_token():
    with pytest.raises(ValueError, match="after 1 tokens"):
        _ = passes.Pass([5], 1, 0.1).ms_per_token
    assert passes.Pass([5, 6, 7, 8, 9], 2, 0.3).ms_per_token == pytest.approx(100)  # the first two came at once


def test_spread_interpolates():
    assert speed.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == speed.Spread(3.0, 1.4, pytest.approx(4.6))
    assert speed.Spread.of([7.0]) == speed.Spread(7.0, 7.0, 7.0)


def test_cells_cross_ratios_and_trees():
    sweep = speed.Sweep(keep_ratios=(0.1, 0.2), trees=("paper", "chain:2"), methods=("plain", "chain", "tree"))
    assert [(cell.method, cell.keep_ratio, cell.tree) for cell in sweep.cells()] == [
        ("plain", None, None),
        ("chain", 0.1, "chain:2"),
        ("chain", 0.2, "chain:2"),
        ("tree", 0.1, "paper"),
        ("tree", 0.2, "paper"),
    ]


# The command

NUMBERS = {"visual_tokens", "end_to_end_s", "peak_gib", "weights_gib", "kv_gib", "prompt_tokens", "num_tokens"}
KEYS = NUMBERS | {
    "pair", "method", "keep_ratio", "tree", "ms_per_token", "steps", "mean_accepted_length", "ttft_s", "follows_plant",
    "is_plain", "kept_visual_tokens", "round_ms", "prefill_s", "error", "provenance",
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
    assert [*lines] == ["plain", "chain", "tree", *peers.PEERS]
    for line in lines.values():
        check_schema(line)
    assert set(lines["plain"]["steps"]) == {"plain"}
    assert set(lines["tree"]["steps"]) == {"verify", "draft"}
    assert lines["tree"]["steps"]["verify"]["rows"] == 26
    assert lines["tree"]["steps"]["draft"]["rows"] == 4
    assert lines["chain"]["steps"]["verify"]["rows"] == 3
    assert (lines["tree"]["keep_ratio"], lines["tree"]["kept_visual_tokens"]) == (0.2, 13)
    assert lines["plain"]["tree"] is lines["plain"]["keep_ratio"] is lines["plain"]["mean_accepted_length"] is None
    assert set(lines["tree"]["ttft_s"]) == {"read", "encode", "prefill", "prune", "draft_prefill"}
    assert set(lines["plain"]["ttft_s"]) == {"read", "encode", "prefill"}
    assert set(lines["transformers-eager"]["ttft_s"]) == {"read", "encode_prefill"}
    assert set(lines["plain"]["prefill_s"]) == {"unscored", "scored"}
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

    def prefill(model, visual_tokens, sweep):
        if visual_tokens == 128:
            assert len(out.read_text().splitlines()) == 2  # a killed run would keep them
            raise KeyboardInterrupt
        if visual_tokens == 32:
            raise torch.OutOfMemoryError("no room")
        return usual(model, visual_tokens, sweep)

    monkeypatch.setattr(speed, "_prefill", prefill)
    args = [*TINY, "--methods", "plain", "--visual-tokens", "32,64,128", "--out", str(out)]
    assert cli.main(args) == 130
    failed, measured = map(json.loads, out.read_text().splitlines())
    assert (failed["visual_tokens"], failed["error"]) == (32, "OutOfMemoryError: no room")
    assert measured["visual_tokens"] == 64
    assert "| plain |" in capsys.readouterr().out


def test_no_prefill_outlives_the_next(monkeypatch):
    usual, sessions = SpecVLM.prefill, []

    def prefill(self, request):
        assert all(session() is None for session in sessions)
        start = usual(self, request)
        sessions.append(weakref.ref(start.session))
        return start

    monkeypatch.setattr(SpecVLM, "prefill", prefill)
    sweep = speed.Sweep(visual_tokens=(32, 64), methods=("plain",), num_tokens=4, repeats=1, slow_repeats=1)
    records = list(speed.measure(subject(PAIRS[0]), sweep, 10.0, lambda text: None))
    assert [record.error for record in records] == [None, None]
    assert len(sessions) == 8


def test_a_pair_that_does_not_load_is_recorded(monkeypatch):
    def load(source, device, dtype):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PlantedSource, "load", load)
    sweep = speed.Sweep(methods=("plain", "tree"), visual_tokens=(64, 128))
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
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
        (["--device", "abacus"], "device='abacus' is not available"),
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
    args = (CheckpointSource("/nowhere", "x"), speed.Sweep(), torch.device("cuda"), torch.bfloat16, print, "python")
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


@pytest.mark.parametrize("lines", [LINES, LINES[::2]], ids=["several lengths", "one length"])
def test_plots_are_written(tmp_path, lines):
    pytest.importorskip("matplotlib")
    failed = line("tree", 128, 1.0, "paper") | {"ms_per_token": None, "error": "x"}
    files = plots.draw([*lines, failed], str(tmp_path / "plots"))
    assert [file.name for file in files] == ["a-b-speed.png", "a-b-stages.png", "a-b-steps.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*TINY, "--plots", "plots"]) == 2
    assert 'plots need matplotlib: pip install "specvlm[bench]"' in capsys.readouterr().err
