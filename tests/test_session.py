"""Sessions: the fused decoder against the Hugging Face modules, prefill in chunks, and storage that is handed on."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import load

from specvlm import SpecVLM
from specvlm.core import tree
from specvlm.runtime import graphs
from specvlm.runtime.decoder import Decoder, is_supported
from specvlm.runtime.graphs import Workspaces
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import FusedSession, HFSession

PROMPT = "What happens in the video?"
TREES = ("chain:1", "chain:5", "paper", "0,1,2,00,01,02,020")


def prefilled(pair, num_frames=6, **settings):
    return pair.prefill(pair.request(tiny.video(num_frames), PROMPT, **settings))


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_fused_layers_give_what_the_modules_give(pair):
    fused, eager = prefilled(pair), prefilled(pair, eager=True)
    assert isinstance(fused.session, FusedSession)
    assert isinstance(eager.session, HFSession)
    close(fused.logits, eager.logits)
    close(fused.scores, eager.scores, 1e-6)
    for spec in TREES:
        parents = (-1, *(parent + 1 for parent in tree.parse(spec).parents))
        tokens = torch.randint(0, 250, (len(parents),), generator=torch.Generator().manual_seed(1))
        close(fused.session.step(tokens, parents), eager.session.step(tokens, parents))
        path = [0, 1] if spec == "paper" else [0]
        for start in (fused, eager):
            start.session.keep(path)
        late = (fused.session.step(tokens[:1], [-1]), eager.session.step(tokens[:1], [-1]))
        close(*late)
        later = [start.session.step(tokens[:2], [0, 0]) for start in (fused, eager)]  # behind the row before
        close(*later)
        for start, found in zip((fused, eager), later, strict=True):
            start.session.keep(())
            close(start.session.step(tokens[[0, 0, 1]], [-1, 0, 0])[1:], found)
        for start in (fused, eager):
            start.session.rollback()


def test_eager_answers_are_the_same(pair):
    for settings in ({"drafter": "none"}, {"keep_ratio": 0.5}, {"repetition_penalty": 1.4}, {"temperature": 1.0}):
        answers = [
            pair.generate(tiny.video(6), PROMPT, max_new_tokens=16, seed=3, eager=eager, **settings)
            for eager in (False, True)
        ]
        assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_a_prefill_in_chunks_is_the_prefill(pair, monkeypatch, eager, size):
    whole = prefilled(pair, eager=eager)
    monkeypatch.setattr("specvlm.runtime.session.PREFILL_ROWS", size)
    parts = prefilled(pair, eager=eager)
    close(parts.logits, whole.logits)
    close(parts.scores, whole.scores, 1e-6)
    assert parts.scores.sum() > 0
    lengths = [len(part) for part in whole.prompt.chunks(size)]
    assert sum(lengths) == len(whole.prompt)
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    tokens = torch.tensor([5, 6, 7])
    close(parts.session.step(tokens, [-1, 0, 0]), whole.session.step(tokens, [-1, 0, 0]))


def test_the_modules_share_the_memory_of_the_joined_weights():
    model = VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl"), device="cpu")
    layer = model.hf.model.language_model.layers[0]
    heads = layer.self_attn
    pointers = {part.weight.untyped_storage().data_ptr() for part in (heads.q_proj, heads.k_proj, heads.v_proj)}
    assert len(pointers) == 1
    assert len({part.weight.untyped_storage().data_ptr() for part in (layer.mlp.gate_proj, layer.mlp.up_proj)}) == 1


def test_an_unknown_kind_of_layer_runs_on_the_modules():
    model = VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl"), device="cpu")
    silu = prefilled(SpecVLM(model)).logits
    text = model.hf.model.language_model
    text.layers[1].mlp.act_fn = torch.nn.GELU()
    assert not is_supported(text, model.hf.lm_head, model.device)
    other = VideoLM(model.hf, model.family)
    assert other.decoder is None
    start = prefilled(SpecVLM(other))
    assert isinstance(start.session, HFSession)
    assert not torch.allclose(start.logits, silu, rtol=0, atol=1e-2)
    text.layers[1].mlp.act_fn = torch.nn.SiLU()
    assert isinstance(VideoLM(model.hf, model.family).decoder, Decoder)


def test_storage_is_handed_on_but_never_shared():
    model = SpecVLM(load("qwen2_5_vl", "target"))
    gc.collect()
    first, second = prefilled(model), prefilled(model, 4)
    one, two = first.session.workspace, second.session.workspace
    assert one is not two
    del first
    third = prefilled(model)
    assert third.session.workspace is one
    fourth = prefilled(model)
    assert fourth.session.workspace not in (one, two)
    del fourth, third, second
    assert prefilled(model, 2).session.workspace in (one, two)


def test_the_graphs_least_used_of_late_make_room(monkeypatch):
    captured = []

    class Graph:
        def __init__(self, function, pool, device):
            captured.append(function())
            self.replay = function

    monkeypatch.setattr(graphs, "Graph", Graph)
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    workspace = Workspaces((1, 1, 4), torch.float32, torch.device("cpu")).lease(4)
    ran = [workspace.run(key, lambda key=key: key) for key in "abacab"]
    assert ran == list("abacab")
    assert captured == list("abcb")  # "c" took the place of "b"
    assert workspace.has("a")
    assert workspace.has("b")
    assert not workspace.has("c")


class Cuda:
    """torch.cuda as far as a capture needs it: which device is current, and torch's one default stream for captures."""

    default_capture_stream = None

    def __init__(self):
        self.current = torch.device("cuda:0")

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def Stream(self, device=None):
        return SimpleNamespace(device=device or self.current)

    def stream(self, stream):
        return self.device(stream.device)

    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.default_capture_stream = self.default_capture_stream or self.Stream()
        graph.captured_on = stream or self.default_capture_stream
        return self.stream(graph.captured_on)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)


def test_graphs_of_two_devices_are_captured_each_on_its_own(monkeypatch):
    cuda, ran = Cuda(), []
    graphs._capture_stream.cache_clear()
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))
    for device in map(torch.device, ("cuda:0", "cuda:1", "cuda:0", "cuda:1")):
        graph = graphs.Graph(lambda: ran.append(cuda.current), "pool", device)
        assert graph._graph.captured_on.device == device
        assert ran[-2:] == [device, device]  # once to warm up, once captured
        assert cuda.current == torch.device("cuda:0")
    graphs._capture_stream.cache_clear()


def test_too_small_storage_is_given_up():
    workspaces = Workspaces((1, 1, 4), torch.float32, torch.device("cpu"))
    small = workspaces.lease(10)
    workspaces.release(small)
    large = workspaces.lease(11)
    assert large is not small
    assert large.capacity == 11
    workspaces.release(large)
    assert workspaces.lease(5) is large
