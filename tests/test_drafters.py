"""What drafters propose and refuse, beside the lossless matrix of test_engine.py."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from conftest import load

from specvlm import ConfigError, SamplingConfig, SpecVLM, prune
from specvlm.core import tree
from specvlm.core.rows import Rows, ancestors, ancestors_on_device
from specvlm.core.tree import Shape
from specvlm.engine.account import Decision
from specvlm.engine.explain import explain
from specvlm.engine.pair import bundled
from specvlm.kernels import quant
from specvlm.runtime import model
from specvlm.runtime.graphs import Workspace
from specvlm.runtime.model import VideoLM
from specvlm.runtime.session import FusedSession
from specvlm.speculate import policy
from specvlm.speculate.accept import Draft
from specvlm.speculate.costs import FREE_SIZES, GRAPH_SIZES, measure
from specvlm.speculate.drafters import Context, DraftWarning, create, drafter_class
from specvlm.speculate.growth import append_chain, best
from specvlm.speculate.ngrams import Lookup
from specvlm.speculate.policy import PLAIN, Choice

PROMPT = "What happens in the video?"


def found(ids, limit=4, excluded=()):
    lookup = Lookup(excluded)
    lookup.extend(ids)
    return lookup.find(limit)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
        ([1, 2, 7, 8, 2, 3, 9, 9, 1, 2, 3], [9, 9, 1, 2]),  # 1 2 3 never stood before, 2 3 did
        ([1, 2], []),
        ([], []),
        ([5, 1, 2, 6, 9, 1, 2, 7, 4, 1, 2], [7, 4, 1, 2]),  # the latest of two
        ([8, 1, 2, 3, 0, 0, 7, 1, 2, 4, 5, 8, 1, 2], [3, 0, 0, 7]),  # the longer of two
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a loop goes on
        ([3, 3, 3], [3, 3, 3, 3]),
    ],
)
def test_lookup_continues_the_longest_and_latest_match(ids, expected):
    assert found(ids) == expected


def test_lookup_reaches_over_no_visual_token():
    assert found([1, 0, 0, 2, 3, 1, 0, 0, 2], excluded=[0]) == []
    assert found([1, 2, 0, 0, 5, 1, 2], excluded=[0]) == []
    assert found([1, 2, 4, 0, 5, 1, 2], excluded=[0]) == [4]


@pytest.mark.parametrize("parts", [1, 4, 32])
def test_the_best_of_parts_are_the_best(parts):
    scores = torch.randn(5, 320, generator=torch.Generator().manual_seed(0))
    values, places = best(scores, 4, parts)
    top = scores.topk(4)
    assert torch.equal(values, top.values)
    assert torch.equal(places, top.indices)


def test_a_row_that_the_parts_do_not_divide_stays_whole():
    scores = torch.arange(130.0).flip(0)[None]
    assert best(scores, 3, 32)[1].tolist() == [[0, 1, 2]]
    assert best(scores[:, :64], 4, 32)[1].tolist() == [[0, 1, 2, 3]]


def test_lookup_is_a_branch_of_its_own():
    draft = Draft.of([5, 6, 7], [-1, -1, 0])
    both = append_chain(draft, [8, 9], torch.device("cpu"))
    assert both.tokens.tolist() == [5, 6, 7, 8, 9]
    assert both.parents.tolist() == [-1, -1, 0, -1, 3]
    expected = Rows.of((-1, 0, 0, 1, 0, 4), 6, torch.device("cpu"))
    assert torch.equal(both.rows.sees, expected.sees)
    assert both.rows.depths.tolist() == expected.depths.tolist()


@pytest.mark.parametrize("parents", [(-1, -1, 0, 0, 2, 4, 4), (-1, 0, 1, 2), (-1, -1, -1), (-1,)])
def test_what_rows_see_is_the_same_on_the_device(parents):
    ours = ancestors_on_device(torch.tensor(parents), 4)
    assert torch.equal(ours, ancestors(parents))


def test_shapes_run_what_they_say():
    assert Shape(4, 1, 7).passes == (1, 1, 1, 1)
    assert Shape(4, 8, 31).passes == (1, 4, 8, 8)
    assert tree.parse("paper").passes == (1, 4, 4, 1, 1)
    assert PLAIN.passes == ()
    assert tree.parse("dynamic") == Shape(5, 4, 25)


def test_self_drafting_gathers_what_a_prefill_would_compute(pair):
    """With all visual tokens kept, the gathered rows are those of the target's own prefill."""
    start = pair.prefill(pair.request(tiny.video(4), PROMPT))
    keep = torch.arange(start.prompt.num_visual)
    branch = pair.target.branch(start.prompt, start.session, start.prompt.rows(keep), 8)
    tokens = torch.tensor([5, 6, 7])
    ours, theirs = branch.step(tokens, [-1, 0, 1]), start.session.step(tokens, [-1, 0, 1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert branch.position == start.session.position


def test_self_drafting_on_everything_accepts_everything(pair):
    model = SpecVLM(pair.target)
    with pytest.warns(DraftWarning, match="set draft_quant or a keep_ratio below 1"):
        answer = model.generate(
            tiny.video(6), PROMPT, drafter="self", keep_ratio=1.0, tree="chain:4", max_new_tokens=21
        )
    assert answer.speculation.accepted_tokens == 16
    assert answer.seconds["draft_prefill"] < answer.seconds["prefill"]


def test_kept_tokens_are_chosen_anew(pair):
    """A refresh replaces the draft's visual rows by those that the text attends to now; the target's stay."""
    request = pair.request(tiny.video(6), PROMPT, drafter="self", refresh=1, keep_ratio=0.3, tree="chain:2")
    start = pair.prefill(request)
    drafters = []
    original = create

    def watched(*args):
        drafters.append(original(*args))
        return drafters[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specvlm.engine.drafts.drafting.create", watched)
        rounds = pair.decode(request, start)
        next(rounds)
        next(rounds)
    drafter, index = drafters[0], start.prompt.visual_index
    places = drafter._pruned.visual_index
    rows = drafter._session.workspace.storage[:, :, :, places]
    target = start.session.workspace.storage[:, :, :, index]
    scores = (start.scores + drafter._watched.mean) / 2
    assert drafter._watched.mean.sum() > 0
    kept = [int((target == row[:, :, :, None]).all((0, 1, 2, 4)).nonzero()) for row in rows.unbind(3)]
    assert len(set(kept)) == len(places)
    assert scores[kept].sum() > scores.mean() * len(kept)


@pytest.mark.parametrize("drafter", ["model", "self"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}])
def test_a_quantised_draft_is_lossless(pair, drafter, sampling):
    small = (pair.target if drafter == "self" else pair.draft).quantised("int8")
    quantised, ask = SpecVLM(pair.target, small), {"max_new_tokens": 24, **sampling}
    plain = pair.generate(tiny.video(6), PROMPT, drafter="none", **ask)
    for settings in ({"policy": "fixed"}, {"tree": "paper", "keep_ratio": 1.0}, {"policy": "auto", "lookup_tokens": 3}):
        answer = quantised.generate(tiny.video(6), PROMPT, drafter=drafter, **settings, **ask)
        assert answer.token_ids == plain.token_ids
        if drafter == "self" and "keep_ratio" in settings:
            assert answer.speculation.mean_accepted_length > 2  # it is the target, nearly


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_every_format_drafts_losslessly(format, monkeypatch):
    """The reference stands in for the kernels, which no CPU has."""
    monkeypatch.setattr(model, "is_served", lambda format, device: True)
    target = load("qwen2_5_vl", "target")
    quantised = SpecVLM(target, target.quantised(format))
    plain = quantised.generate(tiny.video(6), PROMPT, drafter="none", max_new_tokens=24)
    for drafter in ("model", "self"):
        answer = quantised.generate(tiny.video(6), PROMPT, drafter=drafter, tree="paper", max_new_tokens=24)
        assert answer.token_ids == plain.token_ids
    assert quantised.models["draft_quant"] == format


def test_a_quantised_model_computes_nearly_what_the_model_does():
    """With norms that are not all ones, since their weights become part of the products; few rows and many."""
    full = VideoLM.from_pretrained(tiny.checkpoint("qwen3_vl", "target"), device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in full.hf.model.language_model.named_parameters():
            if "layernorm" in name or name == "norm.weight":
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    start = SpecVLM(full).prefill(SpecVLM(full).request(tiny.video(4), PROMPT + " red ball" * 40))
    assert len(start.prompt) > quant.MAX_ROWS
    small = full.quantised("int8")
    session, logits, _ = small.start(start.prompt, 16)
    assert torch.nn.functional.cosine_similarity(logits, start.logits, dim=0) > 0.99
    tokens = torch.tensor([5, 6, 7])
    ours, theirs = (one.step(tokens, [-1, 0, 0]) for one in (session, start.session))
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.99
    with pytest.raises(ConfigError, match="draft_quant='int4' has no kernel for cpu"):
        full.quantised("int4")


def test_a_draft_without_originals_gives_its_memory_back():
    draft = VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl", "near"), device="cpu")
    before = sum(part.numel() for part in draft.hf.model.language_model.layers.parameters())
    small = draft.quantised("int8", keep_original=False)
    after = sum(part.numel() for part in draft.hf.model.language_model.layers.parameters())
    assert after < before / 10
    pair = SpecVLM(load("qwen2_5_vl", "target"), small)
    assert pair.generate(tiny.video(4), PROMPT, tree="paper", max_new_tokens=8).speculation.rounds > 0


def test_a_quantisation_without_a_kernel_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="draft_quant='fp8' has no kernel for cpu: choose int8, or leave it out"):
        SpecVLM.from_pretrained("no/such/model", draft="self", draft_quant="fp8", device="cpu")
    with pytest.raises(ConfigError, match="draft_quant='int2' is not allowed: fp8, int8, int4"):
        SpecVLM.from_pretrained("no/such/model", draft="self", draft_quant="int2", device="cpu")
    with pytest.raises(ConfigError, match="draft_quant='int8' is not allowed without a draft"):
        SpecVLM.from_pretrained("no/such/model", draft_quant="int8", device="cpu")
    with pytest.raises(ConfigError, match="for self-drafting beside another draft: leave draft='other' out"):
        SpecVLM.from_pretrained("no/such/model", draft="other", drafter="self", draft_quant="int8", device="cpu")
    with pytest.raises(ConfigError, match="draft_device='cpu' is not allowed for self-drafting"):
        SpecVLM.from_pretrained("no/such/model", draft="self", draft_device="cpu", device="cpu")


def test_a_pair_is_loaded_as_it_was_asked_for():
    own = SpecVLM.from_pretrained(draft="self", draft_quant="int8", device="cpu")
    assert own.draft.hf is own.target.hf
    assert (own.draft.quant, own.target.quant) == ("int8", None)
    assert own.config.draft.drafter == "self"
    assert SpecVLM.from_pretrained(drafter="lookup", device="cpu").draft is None
    own = SpecVLM.from_pretrained(drafter="self", draft_quant="int8", device="cpu")
    assert own.draft.hf is own.target.hf
    assert own.models["draft_quant"] == "int8"
    same = bundled("target")
    assert SpecVLM.from_pretrained(same, draft=same, draft_quant="int8", device="cpu").draft.quant == "int8"


def test_looking_up_in_an_empty_prompt_is_pointed_out():
    pair = SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))
    for settings in ({"drafter": "lookup"}, {"lookup_tokens": 3}):
        with pytest.warns(DraftWarning, match="ask a question, or draft with a model"):
            pair.request(tiny.video(2), " ", **settings)
        pair.request(tiny.video(2), "What?", **settings)


def test_measured_costs_grow_with_the_rows(pair):
    start = pair.prefill(pair.request(tiny.video(6), PROMPT))
    length = start.session.length
    keep = torch.arange(start.prompt.num_visual)
    asked = Context(pair.target, start.session, start.inputs, start.prompt, keep, start.scores, SamplingConfig())
    costs = measure(start.session, create(pair.config.draft, None, asked), [tree.chain(3)])
    assert start.session.length == length == start.session.cache.length
    assert costs.verify[1] > 0
    assert set(costs.verify) <= {*FREE_SIZES, *GRAPH_SIZES}


def test_decisions_are_explained_by_stretches():
    shape = Choice(Shape(5, 4, 15), 3.4, 31.2, 17.4)
    probe = Choice(Shape(1, 1, 1), 1.1, 22.0, 17.4, is_probe=True)
    plain = Choice(PLAIN, 1.0, 17.4, 17.4, best_ms=19.0, probe_in=12)
    drafted = [Decision(shape, 15, 4), Decision(shape, 15, 2)]
    nothing_found = [Decision(shape, 0, 1)] * 2
    text = explain([*drafted, *nothing_found, Decision(plain, 0, 1), Decision(probe, 1, 2)])
    assert text.splitlines() == [
        "passes 1-2: 15 nodes, depth 5: 3.4 tokens in 31.2 ms, 9.2 ms a token (plain 17.4); came: 3.0",
        "passes 3-4: plain: the drafter had nothing to propose",
        "pass 5: plain: the best tree would take 19.0 ms a token (plain 17.4); next probe in 12 tokens",
        "pass 6: probe: 1 node, depth 1: 1.1 tokens in 22.0 ms, 20.0 ms a token (plain 17.4); came: 2.0",
    ]
    assert explain([]) == "nothing was drafted: the text ended with its first token"
    assert Decision(plain, 0, 1).to_dict()["nodes"] == 0


def test_formats_are_those_of_the_kernels():
    assert quant.QUANTS == ("fp8", "int8", "int4")


@pytest.mark.parametrize("spec", ["dynamic:127:16", "chain:100"])
def test_a_pass_that_could_not_verify_the_looked_up_tokens_is_refused_beforehand(pair, spec):
    most = 127 - len(tree.parse(spec))
    with pytest.raises(ConfigError, match=f"lookup_tokens=32 is not allowed: at most {most} beside tree='{spec}'"):
        pair.request(None, PROMPT, tree=spec, lookup_tokens=32)
    pair.request(None, PROMPT, tree=spec, lookup_tokens=most)


@pytest.mark.parametrize("sizes", [FREE_SIZES, GRAPH_SIZES])
def test_a_policy_keeps_to_the_tree_that_was_named(pair, sizes):
    def options(drafter, spec):
        settings = pair.config.replace(drafter=drafter, tree=spec, policy="auto")
        return drafter_class(settings.draft, pair.draft).options(settings.draft, sizes)

    bounded = options("model", "dynamic:8:2")
    assert max(len(topology) for topology in bounded) in (7, 8)
    assert max(topology.depth for topology in bounded) == 2
    assert options("model", "dynamic:1:1") == [Shape(1, 1, 1)]
    assert options("model", "paper") == [tree.parse("paper")]
    assert [len(topology) for topology in options("lookup", "chain:2")] == [1, 2]
    assert max(len(topology) for topology in options("lookup", "dynamic")) == 31


def test_a_pruner_that_keeps_fewer_later_leaves_the_kept_tokens_as_they_are(monkeypatch):
    pair, calls = SpecVLM(load("qwen2_5_vl", "target")), []

    def fickle(scores, grid, count):
        calls.append(count)
        return scores.topk(max(1, count - len(calls))).indices

    monkeypatch.setitem(prune.PRUNERS, "fickle", fickle)
    settings = {"drafter": "self", "keep_ratio": 0.5, "pruner": "fickle", "tree": "chain:3", "max_new_tokens": 12}
    answer = pair.generate(tiny.video(6), PROMPT, refresh=1, **settings)
    assert len(calls) > 2
    assert answer.token_ids == pair.generate(tiny.video(6), PROMPT, drafter="none", max_new_tokens=12).token_ids


def test_the_time_of_every_capture_is_told_apart(monkeypatch):
    """Else the first round of a shape would pass for what all of its rounds take. Graphs are run eagerly here."""
    monkeypatch.setattr(FusedSession, "is_captured", property(lambda session: True))
    found = []

    def run(workspace, key, function):
        if key not in workspace._graphs:
            workspace._graphs[key] = None
            found.append((key, request.seconds._is_capturing))
        return function()

    @contextmanager
    def stage(name, *devices):
        before, request.seconds._is_capturing = request.seconds._is_capturing, name == "capture"
        yield
        request.seconds._is_capturing = before

    monkeypatch.setattr(Workspace, "run", run)
    draft = VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl", "draft"), device="cpu")
    pair = SpecVLM(VideoLM.from_pretrained(tiny.checkpoint("qwen2_5_vl", "target"), device="cpu"), draft)
    choices = [PLAIN, PLAIN, PLAIN, Shape(2, 4, 7), Shape(2, 4, 3), PLAIN, PLAIN, Shape(3, 1, 3)]
    request = pair.request(tiny.video(4), PROMPT, policy="fixed", ignore_eos=True)
    request.seconds._is_capturing, request.seconds.stage = False, stage
    shapes = iter(choices)
    monkeypatch.setattr(policy.Fixed, "choose", lambda self, left: Choice(next(shapes), 1.0, 1.0, 1.0))
    rounds = pair.rounds(request)
    for _ in range(1 + len(choices)):
        next(rounds)
    kinds = {key[0] for key, _ in found}
    assert kinds == {"rows", "overlap", "level", "nodes"}
    assert all(is_capturing for _, is_capturing in found), found
