"""The same promises on a GPU: fused kernels and CUDA graphs against the Hugging Face modules."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from specvlm import SpecVLM
from specvlm.check import reference
from specvlm.core import tree
from specvlm.runtime.model import VideoLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPT = "What happens in the video?"
LENGTH = 24
SHAPES = {
    "plain": (),
    "chain": tree.parse("chain:5").parents,
    "paper": tree.parse("paper").parents,
    "siblings": (-1,) * 7,
    "largest": tree.parse("chain:127").parents,
}


def load_pair(family, device="cuda", draft_device="cuda", dtype="float32"):
    target = VideoLM.from_pretrained(tiny.checkpoint(family, "target"), device=device, dtype=dtype)
    return SpecVLM(target, VideoLM.from_pretrained(tiny.checkpoint(family, "near"), device=draft_device, dtype=dtype))


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def draft_devices():
    return ["cuda", "cpu"] + ["cuda:1"] * (torch.cuda.device_count() > 1)


@pytest.mark.parametrize("draft_device", draft_devices())
def test_fp32_is_lossless_wherever_the_draft_sits(family, draft_device):
    model = load_pair(family, "cuda", draft_device)
    ask = {"source": tiny.video(6), "prompt": PROMPT, "max_new_tokens": LENGTH}
    plain = model.generate(**ask, drafter="none")
    inputs = model.prefill(model.request(tiny.video(6), PROMPT)).inputs
    assert plain.token_ids == reference.generate(model.target, inputs, max_new_tokens=LENGTH).token_ids
    accepted = 0
    for spec in ("paper", "chain:4"):
        for keep_ratio in (1.0, 0.1):
            answer = model.generate(**ask, tree=spec, keep_ratio=keep_ratio)
            assert answer.token_ids == plain.token_ids
            accepted += answer.speculation.accepted_tokens
    assert accepted > 0
    penalised = [model.generate(**ask, repetition_penalty=1.3, eager=eager).token_ids for eager in (False, True)]
    assert penalised[0] == penalised[1] != plain.token_ids


@TWO_GPUS
@pytest.mark.filterwarnings("ignore::specvlm.speculate.drafters.DraftWarning")
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("places", [("cuda:1", "cuda:0"), ("cuda:1", "cuda:1"), ("cuda:1", "cpu"), ("cpu", "cuda:1")])
def test_whichever_gpu_is_current(family, places, current):
    with torch.cuda.device(current):
        model = load_pair(family, *places)
        ask = {"source": tiny.video(6), "prompt": "red ball, red ball, red ball", "max_new_tokens": LENGTH}
        for sampling in ({}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.3}):
            plain = model.generate(**ask, **sampling, drafter="none").token_ids
            for settings in (
                {"policy": "auto"},
                {"tree": "paper", "keep_ratio": 0.5},
                {"tree": "dynamic:7:3", "lookup_tokens": 5, "policy": "fixed"},
                {"drafter": "self", "tree": "paper", "keep_ratio": 0.5, "refresh": 2},
                {"drafter": "lookup", "policy": "fixed"},
                {"eager": True},
            ):
                assert model.generate(**ask, **sampling, **settings).token_ids == plain, (sampling, settings)
        assert torch.cuda.current_device() == current


@TWO_GPUS
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_a_quantised_draft_on_another_gpu(family, format):
    pair = load_pair(family, "cuda:0", "cuda:1", dtype="bfloat16")
    model = SpecVLM(pair.target, pair.draft.quantised(format))
    ask = {"source": tiny.video(6), "prompt": PROMPT, "max_new_tokens": LENGTH, "keep_ratio": 1.0, "tree": "paper"}
    answer, again = model.generate(**ask), model.generate(**ask)
    assert answer.token_ids == again.token_ids
    assert answer.speculation.accepted_tokens > 0
    assert again.seconds["capture"] == 0


def test_threads_capture_one_after_another(family):
    """A capture in one thread, while others allocate, copy and wait, harms neither."""
    model = load_pair(family)
    trees = ["chain:1", "chain:3", "chain:5", "paper", "dynamic:7:3", "dynamic:15:4"]
    ask = {"source": tiny.video(6), "prompt": PROMPT, "max_new_tokens": LENGTH, "keep_ratio": 0.5, "policy": "fixed"}
    plain = model.generate(**ask, drafter="none").token_ids
    with ThreadPoolExecutor(len(trees)) as pool:
        answers = list(pool.map(lambda spec: model.generate(**ask, tree=spec).token_ids, trees))
    assert answers == [plain] * len(trees)


@pytest.mark.filterwarnings("ignore::specvlm.speculate.drafters.DraftWarning")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 20, "seed": 1}, {"repetition_penalty": 1.3}])
def test_fp32_is_lossless_with_every_drafter(family, sampling):
    model = load_pair(family)
    ask = {"source": tiny.video(6), "prompt": "red ball, red ball, red ball", "max_new_tokens": LENGTH, **sampling}
    plain = model.generate(**ask, drafter="none").token_ids
    for settings in (
        {"policy": "fixed"},
        {"policy": "auto"},
        {"tree": "dynamic:7:3", "lookup_tokens": 5},
        {"drafter": "self", "policy": "fixed"},
        {"drafter": "self", "tree": "paper", "keep_ratio": 0.5, "refresh": 2},
        {"drafter": "self", "keep_ratio": 1.0, "policy": "fixed"},
        {"drafter": "lookup", "policy": "fixed"},
    ):
        assert model.generate(**ask, **settings).token_ids == plain, settings


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("drafter", ["model", "self"])
def test_a_quantised_draft_runs_in_graphs_and_is_lossless(family, format, drafter):
    """In bf16, since the kernels take 2-byte rows: passes of the same 26 rows, so that plain decoding rounds alike."""
    pair = load_pair(family, dtype="bfloat16")
    small = (pair.target if drafter == "self" else pair.draft).quantised(format)
    model = SpecVLM(pair.target, small)
    ask = {"source": tiny.video(6), "prompt": PROMPT, "max_new_tokens": LENGTH, "keep_ratio": 1.0}
    answer = model.generate(**ask, drafter=drafter, tree="paper")
    again = model.generate(**ask, drafter=drafter, tree="paper")
    assert answer.token_ids == again.token_ids
    assert answer.speculation.accepted_tokens > 0
    assert again.seconds["capture"] == 0


def test_bfloat16_is_the_default_and_runs(family):
    model = load_pair(family, "auto", "auto", "auto")
    assert model.target.hf.dtype == torch.bfloat16
    answer = model.generate(tiny.video(6), PROMPT, max_new_tokens=LENGTH)
    assert len(answer.token_ids) == LENGTH
    assert answer.peak_memory_bytes > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_gives_what_the_modules_give(family, shape):
    """At lengths that no block divides, after rollbacks and commits, on storage that another request used before."""
    model = load_pair(family)
    parents = (-1, *(parent + 1 for parent in SHAPES[shape]))
    tokens = torch.randint(0, 250, (len(parents),), generator=torch.Generator().manual_seed(0)).cuda()
    for words, num_frames in ((3, 4), (40, 8), (3, 2)):
        request = {"source": tiny.video(num_frames), "prompt": "red ball " * words, "max_new_tokens": 8}
        fused, eager = (model.prefill(model.request(**request, eager=eager)) for eager in (False, True))
        torch.testing.assert_close(fused.logits, eager.logits, rtol=0, atol=2e-3)
        for rows in ([0], [0], list(range(min(3, len(parents)))) if shape == "chain" else [0]):
            ours, theirs = (start.session.step(tokens, parents) for start in (fused, eager))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
            for start in (fused, eager):
                start.session.keep(rows)
        for start in (fused, eager):
            start.session.rollback()
        ours, theirs = (start.session.step(tokens, parents) for start in (fused, eager))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
        del fused, eager, start


def test_the_second_request_captures_nothing(family):
    model = load_pair(family)
    settings = {"max_new_tokens": LENGTH, "keep_ratio": 0.5, "policy": "fixed"}
    first = model.generate(tiny.video(8), PROMPT, **settings)
    model.generate(tiny.video(8), PROMPT, max_new_tokens=LENGTH, drafter="none")  # a text may end by a plain step
    again = model.generate(tiny.video(4), "red ball " * 9, **settings)
    assert first.seconds["capture"] > 0 == again.seconds["capture"]
    eager = model.generate(tiny.video(4), "red ball " * 9, **settings, eager=True)
    assert again.token_ids == eager.token_ids
    assert eager.seconds["capture"] == 0


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"repetition_penalty": 1.1},
        {"tree": "dynamic:25:5", "policy": "fixed"},
        {"drafter": "self"},
        {"temperature": 1.0, "top_p": 0.9, "seed": 1, "tree": "dynamic:25:5", "policy": "fixed"},
    ],
)
def test_a_round_waits_for_the_gpu_once_and_allocates_nothing(family, changed):
    model = load_pair(family)
    settings = {"max_new_tokens": 160, "keep_ratio": 0.5, "ignore_eos": True, "tree": "paper", **changed}
    request = model.request(tiny.video(8), PROMPT, **settings)
    rounds = model.decode(request, model.prefill(request))
    for _ in range(6):
        next(rounds)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drafted = [len(next(rounds).draft) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drafted == [25] * 4
    assert len([found for found in caught if "synchroniz" in str(found.message)]) == 4
    after = torch.cuda.memory_stats()
    for name in ("num_device_alloc", "reserved_bytes.all.current"):
        assert before[name] == after[name]


def test_long_prompts_are_prefilled_in_chunks(family, monkeypatch):
    model = load_pair(family)
    whole = model.prefill(model.request(tiny.video(8), PROMPT))
    monkeypatch.setattr("specvlm.runtime.session.PREFILL_ROWS", 17)
    parts = model.prefill(model.request(tiny.video(8), PROMPT))
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=2e-3)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=0, atol=1e-5)
