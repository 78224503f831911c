"""Drafters, pruners and requests used wrongly: refused in words that say whose fault it is."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from conftest import load

from specvlm import ConfigError, SpecVLM
from specvlm.core.rows import Rows
from specvlm.prune import PRUNERS, pruner
from specvlm.speculate.accept import Draft
from specvlm.speculate.drafters import DRAFTERS, Drafter, drafter

PARENTS = [-1, -1, 0, 1]
GOOD = Draft.of([5, 6, 7, 8], PARENTS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))


def ask(model, **settings):
    return model.generate(tiny.video(4), "What happens?", max_new_tokens=8, **{"tree": "paper", **settings}).token_ids


def rows_of(*parents):
    return Rows.of((-1, *(parent + 1 for parent in parents)), len(parents) + 1, CPU)


WRONG_DRAFTS = {
    "a list": [5, 6],
    "nothing": None,
    "tokens of int32": replace(GOOD, tokens=GOOD.tokens.int()),
    "tokens in a matrix": replace(GOOD, tokens=GOOD.tokens[None]),
    "tokens as a list": replace(GOOD, tokens=[5, 6, 7, 8]),
    "tokens beyond the vocabulary": replace(GOOD, tokens=torch.tensor([5, 6, 7, 10**6])),
    "a token below -1": replace(GOOD, tokens=torch.tensor([5, -2, 7, 8])),
    "too few parents": replace(GOOD, parents=GOOD.parents[:-1]),
    "a parent behind its child": replace(GOOD, parents=torch.tensor([2, -1, -1, 1])),
    "a node that is its own parent": replace(GOOD, parents=torch.tensor([-1, -1, 2, 1])),
    "a parent below -1": replace(GOOD, parents=torch.tensor([-1, -2, 0, 1])),
    "parents as floats": replace(GOOD, parents=GOOD.parents.float()),
    "rows of a tree of equal depths": replace(GOOD, rows=rows_of(-1, -1, 1, 0)),
    "rows of a smaller tree": replace(GOOD, rows=rows_of(-1, -1, 0)),
    "rows of a chain": replace(GOOD, rows=rows_of(-1, 0, 1, 2)),
    "rows said to be a chain": replace(GOOD, rows=replace(GOOD.rows, is_chain=True)),
    "rows of wrong depths": replace(GOOD, rows=replace(GOOD.rows, depths=GOOD.rows.depths + 1)),
    "rows of numbers": replace(GOOD, rows=replace(GOOD.rows, sees=GOOD.rows.sees.int())),
    "no rows": replace(GOOD, rows=None),
    "too many nodes": Draft.of([3] * 128, [-1] * 128),
}


@pytest.mark.parametrize("name", WRONG_DRAFTS)
def test_what_is_no_draft_of_this_target_is_refused(name, model, monkeypatch):
    monkeypatch.setattr("specvlm.speculate.drafters.base.DRAFTERS", dict(DRAFTERS))

    @drafter("strange")
    class Strange(Drafter):
        def propose(self, token, topology):
            return WRONG_DRAFTS[name]

    with pytest.raises(ConfigError, match=r"Strange.propose\(\) returned") as error:
        ask(model, drafter="strange", tree="chain:2")
    assert "\n" not in str(error.value)


def test_a_strangers_good_drafts_change_nothing_and_its_failure_is_named(model, monkeypatch):
    monkeypatch.setattr("specvlm.speculate.drafters.base.DRAFTERS", dict(DRAFTERS))

    @drafter("good")
    class Good(Drafter):
        def propose(self, token, topology):
            return GOOD

    @drafter("failing")
    class Failing(Drafter):
        def propose(self, token, topology):
            raise KeyError(token)

    assert ask(model, drafter="good", tree="chain:2") == ask(model, drafter="none")
    with pytest.raises(ConfigError, match=r"Failing.propose\(\) failed: KeyError: \d+"):
        ask(model, drafter="failing", tree="chain:2")


WRONG_PRUNED = {
    "a list": [0, 1],
    "nothing": None,
    "an array": np.array([0, 1]),
    "floats": torch.tensor([0.0, 1.0]),
    "a mask": torch.tensor([True, False]),
    "a matrix": torch.tensor([[0, 1]]),
    "a number": torch.tensor(1),
    "text": "01",
}


@pytest.mark.parametrize("per_visual", [False, True])
@pytest.mark.parametrize("name", WRONG_PRUNED)
def test_what_is_no_indices_is_refused(name, per_visual, model, monkeypatch):
    monkeypatch.setattr("specvlm.prune.selection.PRUNERS", dict(PRUNERS))
    pruner("strange", scored=False)(lambda scores, grid, count: WRONG_PRUNED[name])
    with pytest.raises(ConfigError, match=r"pruner 'strange' returned .* wanted"):
        ask(model, pruner="strange", per_visual=per_visual)


def test_a_pruner_that_fails_is_named(model, monkeypatch):
    monkeypatch.setattr("specvlm.prune.selection.PRUNERS", dict(PRUNERS))
    pruner("strange", scored=False)(lambda scores, grid, count: scores[10**6])
    with pytest.raises(ConfigError, match="pruner 'strange' failed: IndexError"):
        ask(model, pruner="strange")


def test_a_prefill_is_decoded_again_after_a_rollback_only(model):
    def request():
        return model.request(tiny.video(4), "What happens?", max_new_tokens=6, tree="paper")

    start = model.prefill(request())
    first = [latest.token_ids for latest in model.decode(request(), start)]
    with pytest.raises(ConfigError, match=r"session.rollback\(\)"):
        next(model.decode(request(), start))
    start.session.rollback()
    assert [latest.token_ids for latest in model.decode(request(), start)] == first


def test_a_request_runs_once(model):
    request = model.request(tiny.video(4), "What happens?", max_new_tokens=3, tree="paper")
    list(model.rounds(request))
    for run in (model.rounds, model.stream_request):
        with pytest.raises(ConfigError, match="runs once"):
            next(iter(run(request)))


@pytest.mark.parametrize("needs_model", [False, True])
def test_a_drafter_says_itself_whether_it_needs_a_draft(needs_model, monkeypatch):
    monkeypatch.setitem(DRAFTERS, "own", type("Own", (Drafter,), {"needs_model": needs_model}))
    model = SpecVLM.from_pretrained(device="cpu", drafter="own", tree="chain:1")
    assert (model.draft is not None) is needs_model
