"""From when on a request drafts, what that costs it, and what it leaves to the next ones."""

import threading

import pytest
import tiny
from conftest import load

from specvlm import SpecVLM
from specvlm.core.tree import PLAIN, parse
from specvlm.engine import drafts
from specvlm.speculate.drafters import create
from specvlm.speculate.drafters.model import ModelDrafter
from specvlm.speculate.lengths import Lengths
from specvlm.speculate.memory import Memory, Recent, StepTimes
from specvlm.speculate.pace import Costs
from specvlm.speculate.policy import Auto, Choice, Fixed

PROMPT = "What happens in the video?"
PLAIN_MS = 10.0


@pytest.fixture
def pair():
    return SpecVLM(load("qwen2_5_vl", "target"), load("qwen2_5_vl", "near"))


@pytest.fixture
def asked(monkeypatch):
    """Every answer's prefill takes 500 ms, a draft's a tenth of that, rounds what their costs say."""
    learn = Auto.learn
    costs = Costs.guess(PLAIN_MS, 0.1)

    def told(self, choice, seen, num_tokens, ms):
        learn(self, choice, seen, num_tokens, None if ms is None else costs.round_ms(choice.topology))

    monkeypatch.setattr(Auto, "learn", told)
    monkeypatch.setattr(ModelDrafter, "relative_size", lambda model, target: 0.1)  # whatever the tiny ones have
    monkeypatch.setattr(Memory, "start_share", lambda self, kind, otherwise: 0.1 if otherwise else 0.0)
    made = []

    class Timed(drafts.Drafts):
        def __init__(self, target, draft, memory, request, start):
            super().__init__(target, draft, memory, request, type(start)(**{**vars(start), "seconds": 0.5}))

    def watched(*args):
        made.append(create(*args))
        return made[-1]

    monkeypatch.setattr("specvlm.engine.api.Drafts", Timed)
    monkeypatch.setattr("specvlm.engine.drafts.drafting.create", watched)
    return made


def ask(pair, num_tokens, **settings):
    settings = {"keep_ratio": 1.0, "ignore_eos": True, **settings}
    return pair.generate(tiny.video(4), PROMPT, max_new_tokens=num_tokens, **settings)


def begun(answer):
    """Return the tokens that came before the first round that drafted, None where none did."""
    tokens = 1
    for decision in answer.decisions:
        if len(decision.choice.topology):
            return tokens
        tokens += decision.num_tokens
    return None


# From when on


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 16, 24])
def test_a_short_answer_runs_nothing_of_the_draft(pair, asked, num_tokens):
    for _ in range(3):
        answer = ask(pair, num_tokens)
        assert (asked, answer.speculation.rounds, answer.usage.kept_visual_tokens) == ([], 0, 0)
        assert answer.seconds["draft_prefill"] == answer.seconds["prune"] == 0


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_nothing_is_scored_where_nothing_can_be_drafted(pair, num_tokens):
    start = pair.prefill(pair.request(tiny.video(4), PROMPT, max_new_tokens=num_tokens, tree="paper"))
    assert not start.scores.any()
    assert pair.prefill(pair.request(tiny.video(4), PROMPT, max_new_tokens=3, tree="paper")).scores.any()


def test_an_answer_that_may_be_long_is_drafted_after_its_first_tokens_and_the_next_at_once(pair, asked):
    first, second = ask(pair, 120), ask(pair, 120)
    assert begun(first) == 32
    assert begun(second) <= 2
    assert len(asked) == 2
    assert first.token_ids == second.token_ids == ask(pair, 120, drafter="none").token_ids


def test_answers_to_such_prompts_that_were_short_come_plainly(pair, asked):
    eos = ask(pair, 8).token_ids[6]
    pair.target.eos_ids, usual = frozenset({eos}), pair.target.eos_ids
    try:
        for _ in range(4):
            answer = pair.generate(tiny.video(4), PROMPT, max_new_tokens=256)
            assert (answer.usage.completion_tokens, answer.speculation.rounds) == (7, 0)
    finally:
        pair.target.eos_ids = usual
    assert asked == []


def test_a_named_tree_is_drafted_from_the_first_round(pair, asked):
    answer = ask(pair, 6, tree="paper")
    assert begun(answer) == 1
    assert len(asked) == 1


@pytest.mark.parametrize("drafter", ["self", "lookup"])
def test_what_costs_nothing_to_start_starts_as_soon_as_a_plain_step_is_known(pair, asked, drafter):
    assert begun(ask(pair, 24, drafter=drafter, keep_ratio=0.5)) in (2, 3)


@pytest.mark.parametrize("drafter", ["model", "self", "lookup"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("rehearsals", [0, 2])
def test_a_draft_that_begins_late_knows_the_text_so_far(pair, monkeypatch, drafter, settings, rehearsals):
    """The same proposals as one that was there from the beginning, and the same words; timing it changes nothing."""
    shape, rounds = parse("chain:3"), iter(())
    propose = ModelDrafter.propose

    def rehearsed(self, token, topology):
        for _ in range(rehearsals if len(topology) else 0):
            self.rehearse(topology)
        return propose(self, token, topology)

    monkeypatch.setattr(ModelDrafter, "propose", rehearsed)

    def choose(self, left):
        return Choice(shape if next(rounds) else PLAIN, 1.0, 1.0, 1.0)

    monkeypatch.setattr(Fixed, "choose", choose)
    found = []
    for late in (False, True):
        rounds = iter([not late, 0, 0, 0, 0, 1, 1])
        request = pair.request(tiny.video(4), PROMPT, drafter=drafter, tree="chain:3", ignore_eos=True, **settings)
        steps = pair.rounds(request)
        token_ids, drafted = [], {}
        for latest in (next(steps) for _ in range(8)):
            drafted[len(token_ids)] = latest.draft.tokens.tolist()
            token_ids += latest.token_ids
        found.append((token_ids, drafted))
    (early_ids, early), (late_ids, lately) = found
    count = min(len(early_ids), len(late_ids))
    assert early_ids[:count] == late_ids[:count]
    shared = [place for place in lately if lately[place] and early.get(place)]
    assert all(lately[place] == early[place] for place in shared)
    assert drafter == "lookup" or any(lately.values())


# What is left to the next requests


def test_times_are_known_whatever_the_temperature_the_seed_and_the_keep_ratio(pair, asked):
    for seed in range(5):
        ask(pair, 120, temperature=0.5 + 0.01 * seed, seed=seed, keep_ratio=0.1 + 0.001 * seed)
    assert len(pair._memory.times) <= 3  # the target's and the draft's, of one or two lengths
    assert len(asked) == 5


def test_what_was_learnt_is_handed_to_the_next_request_and_forgotten_after_many(pair, asked):
    ask(pair, 64)
    assert len(pair._memory.acceptance) == 1
    ask(pair, 64, policy="fixed")
    assert len(pair._memory.acceptance) == 1  # nothing chose there
    recent = Recent(most=8)
    for key in range(100):
        recent.put(key, [key])
        assert recent.get(0, list) == [0]  # asked for every time
    assert len(recent) == 8
    assert recent.get(50, lambda: "new") == "new"


def test_what_is_handed_out_is_a_copy():
    recent = Recent()
    value = [1]
    recent.put("a", value)
    value.append(2)
    recent.get("a", list).append(3)
    assert recent.get("a", list) == [1]


def test_times_of_a_length_that_never_was_are_those_of_the_nearest():
    times, costs = StepTimes(), [Costs({1: ms, 33: 2 * ms}, ms, {1: ms}) for ms in (1.0, 2.0)]
    assert times.get(("run", 100), ("model", 10)) is None
    times.put(("run", 100), ("model", 10), costs[0])
    times.put(("run", 4000), ("model", 400), costs[1])
    assert times.get(("run", 120), ("model", 12)) == costs[0]
    assert times.get(("run", 60_000), ("model", 12)) == Costs(costs[1].verify, 1.0, {1: 1.0})
    assert times.get(("eager", 100), ("model", 10)) is None
    for length in range(2000):
        times.put((f"run {length}", 8), (f"model {length}", 8), costs[0])
    assert len(times) == 128


def test_threads_share_a_memory():
    """No thread sees another's copy; every answer is counted."""
    memory, errors = Memory(), []

    def work(seed):
        try:
            for at in range(200):
                memory.acceptance.put(at % 70, [at])
                memory.acceptance.get(seed, list).append(at)
                memory.lengths.add(at % 70, at, is_cut=False)
                memory.lengths.remaining(seed, 1, 100)
                memory.add_start("model", 0.2, 0.2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert memory.start_share("model", 0.9) == pytest.approx(0.2)


def test_a_first_start_that_compiles_kernels_is_no_usual_one():
    memory = Memory()
    memory.add_start("model", 5.0, 0.1)
    assert memory.start_share("model", 0.1) < 0.15
    for _ in range(20):
        memory.add_start("model", 0.4, 0.1)
    assert memory.start_share("model", 0.1) == pytest.approx(0.4, rel=0.01)  # what comes again and again is believed


# Lengths


def test_expected_lengths_follow_the_answers():
    lengths = Lengths()
    unknown = lengths.remaining("q", 1, 255)
    assert 30 < unknown < 60  # any magnitude may come
    assert lengths.remaining("q", 16, 240) > unknown  # what has become long gets longer
    assert not lengths.are_longer("q", 1)
    for _ in range(20):
        lengths.add("q", 7, is_cut=False)
    assert lengths.remaining("q", 1, 255) < 10
    assert lengths.remaining("other", 1, 255) < 10  # nothing better is known of it
    assert not lengths.are_longer("q", 7)
    assert lengths.are_longer("q", 6)
    for _ in range(20):
        lengths.add("other", 100, is_cut=True)
    assert lengths.remaining("other", 1, 255) > 150
    assert not lengths.are_longer("other", 100)  # it might have gone on, or not
    lengths.add("other", 8, is_cut=True)  # somebody asked for 8 tokens
    assert lengths.are_longer("other", 50)
    lengths.add("other", 8, is_cut=False)
    assert not lengths.are_longer("other", 50)
    for at in range(1000):
        lengths.add(at, 5, is_cut=False)
    assert len(lengths._by_prompt) == 64


def test_a_text_that_a_stop_string_ends_counts_as_ended(pair):
    text = ask(pair, 8).text
    pair.generate(tiny.video(4), PROMPT, max_new_tokens=256, stop=(text[2:4],))
    [known] = pair._memory.lengths._by_prompt.values()
    assert known[0] == (8, True)
    assert known[1][0] <= 8
    assert known[1][1] is False


def test_the_start_of_a_model_is_the_dearest():
    assert ModelDrafter.encodes
    assert ModelDrafter.catches_up
