"""What drafting costs where it does not pay: whole answers on simulated machines, from file to last word.

The bound is kept by accounting, not by tuning: no round is drafted that could exceed it even if nothing of it stood.
Between the bound and these assertions lies only what a plain step may be misjudged by (`SLACK`).
"""

import itertools
import random
import statistics
from dataclasses import replace

import pytest
from test_policy import GOOD, HOPELESS, World, worth
from worlds import CPU, H200, INT4, TINY, Pair, wrong

from specvlm.speculate import policy
from specvlm.speculate.costs import FREE_SIZES, GRAPH_SIZES
from specvlm.speculate.pace import Pace
from specvlm.speculate.policy import PLAIN, Acceptance, Auto, Budget, Credit, Observation, Shape, Start

GRAPHS = policy.shapes(8, 63, GRAPH_SIZES)
FREE = policy.shapes(8, 32, FREE_SIZES)
# Machine, candidates, what passes were timed at (None: guessed), ranks by which drafting is worth next to nothing.
MACHINES = {
    "cpu": (CPU, FREE, None, (0.42, 0.08, 0.04, 0.03)),
    "h200": (H200, GRAPHS, H200.costs, (0.18, 0.06, 0.04, 0.03)),
    "int4": (INT4, GRAPHS, INT4.costs, (0.10, 0.05, 0.03, 0.02)),
    "tiny": (TINY, GRAPHS, TINY.costs, (0.45, 0.10, 0.05, 0.02)),
}
SLACK = 0.006  # of plain decoding's time


def answers(machine, candidates, thought, ranks, seed, *, num_tokens=256, most=256, count=3):
    """Return the times of successive answers over plain decoding's."""
    pair = Pair(machine, thought)
    worlds = (World(ranks, machine.costs, 100 * seed + at) for at in range(count))
    return [pair.answer(world, candidates, num_tokens, most) for world in worlds]


def bound(machine, num_tokens=256):
    """Return what an answer may take over plain decoding: 2.5 %, or the draft's start and two plain steps."""
    plain_ms = machine.costs.verify_ms(1)
    begun = machine.start + 2 * plain_ms if machine.start else 0.0
    return 1 + max(0.025, begun / (machine.before + (num_tokens - 1) * plain_ms)) + SLACK


# By construction


@pytest.mark.parametrize("start_ms", [0.0, 60.0])
def test_no_round_exceeds_the_budget_whatever_the_draft_does(start_ms):
    """An adversary decides hits by what hurts most: it is good until the draft is trusted, and then fails; or dice."""
    shapes = [Shape(1, 1, 3), Shape(2, 1, 7), Shape(4, 4, 15), Shape(8, 8, 31)]
    for seed in range(40):
        dice = random.Random(seed)
        start = Start(start_ms, 400.0, lambda done, left: left, lambda tokens: True)
        chooser = Auto(Pace(CPU.costs), shapes, start=start)
        lost, most, begun_ms, spent = 0.0, 0.0, 0.0, 400.0
        fails = dice.random()
        for done in range(1, 120):
            choice, ms = chooser.choose(119 - done), 6.0
            if len(choice.topology):
                if begun_ms < start_ms:
                    chooser.started()
                    begun_ms = lost = start_ms
                hits = 0 if dice.random() < fails else dice.randint(1, choice.topology.depth)
                fails = min(max(fails + dice.uniform(-0.3, 0.3), 0.0), 1.0)
                ms = chooser.pace.round_ms(choice.topology)
                seen = [Observation(at + 1, 0) for at in range(hits)] + [Observation(hits + 1, None)]
                chooser.learn(choice, seen[: choice.topology.depth], hits + 1)
                lost += ms - 6.0 * (hits + 1)
                spent += 6.0 * (hits + 1)
            else:
                chooser.learn(choice, [], 1, 6.0)
                spent += 6.0
            share = 0.025 * spent + 0.01 * 6.0 * (120 - done)
            most = max(most, lost - max(share, begun_ms + 12.0 if begun_ms else 0.0))
        assert most < 0.5


def test_a_budget_counts_what_was_lost_anew_when_a_plain_step_is_seen():
    budget = Budget(1000.0, 20.0)  # plain steps are thought twice as slow as they are
    budget.add_drafted(1, 15.0)
    assert budget.lost_ms == -5.0
    budget.add_plain(1, 10.0)
    assert budget.lost_ms == 5.0
    budget.add_plain(1, 90.0)  # one that says nothing
    budget.add_plain(1, 10.0)
    assert budget.lost_ms == 5.0
    assert budget.room(100) == pytest.approx(0.025 * (1000 + 20 + 10 + 20 + 10) + 0.01 * 100 * 10 - 5, abs=0.6)


def test_what_was_gained_may_be_lost_again_but_not_all_of_it():
    budget = Budget(0.0, 10.0)
    for _ in range(100):
        budget.add_drafted(4, 20.0)
    assert budget.lost_ms == -120.0
    assert budget.room(0) == pytest.approx(120 + 0.025 * 4000)


def test_a_draft_that_did_not_pay_begins_again_when_that_was_saved_for():
    credit = Credit()
    assert credit.is_trusted
    credit.add(0.0, -10.0)
    assert not credit.is_trusted
    credit.add(10_000.0, 0.0)
    assert credit.saved_ms == 50.0
    credit.spend()
    assert credit.saved_ms == 0.0
    for _ in range(9):
        credit.add(0.0, 10.0)
    assert credit.gained == 20.0  # what is long gone does not count


def test_a_long_answer_begins_with_an_untrusted_draft_only_where_its_own_share_pays_for_it():
    credit, start = Credit(), Start(60.0, 400.0, lambda done, left: left, lambda tokens: True, catches_up=False)
    credit.add(0.0, -10.0)
    acceptance = Acceptance()
    acceptance.learn([Observation(1, None)] * 3)
    chooser = Auto(Pace(CPU.costs), FREE, acceptance, credit, start)
    for begun in range(1, 700):
        choice = chooser.choose(700 - begun)
        if len(choice.topology):
            break
        chooser.learn(choice, [], 1, 6.0)
    assert 100 < begun < 200
    assert 60 < 0.025 * (400 + 6 * begun) + 0.01 * 6 * (700 - begun) < 70


# On machines with noise


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("is_hopeless", [True, False], ids=["hopeless", "marginal"])
def test_a_draft_that_does_not_pay_costs_no_more_than_its_bound(name, is_hopeless):
    machine, candidates, thought, marginal = MACHINES[name]
    ranks = HOPELESS if is_hopeless else marginal
    for seed in range(3):
        found = answers(machine, candidates, thought, ranks, seed, count=5)
        assert max(found) < bound(machine)
        assert machine.start < 10 or found[-1] < 1.003  # its start is not paid in every answer


@pytest.mark.parametrize(("name", "num_tokens"), [("cpu", 1000), ("int4", 1000), ("cpu", 2000)])
def test_a_hopeless_draft_in_a_long_answer(name, num_tokens):
    machine, candidates, thought, _ = MACHINES[name]
    found = answers(machine, candidates, thought, HOPELESS, 1, num_tokens=num_tokens, most=num_tokens, count=2)
    assert max(found) < 1.03


@pytest.mark.parametrize("ranks", [HOPELESS, MACHINES["cpu"][3], GOOD], ids=["hopeless", "marginal", "good"])
@pytest.mark.parametrize(
    "factors",
    [(2, 2, 1), (2, 1, 1), (1, 2, 2), (1, 0.5, 0.5), (1.5, 1, 1), (0.5, 0.5, 1), (0.67, 1, 1)],
    ids=str,
)
def test_passes_timed_wrongly_once_cost_no_more(ranks, factors):
    """In this answer and the next: what rounds and plain steps really take is what counts."""
    machine, candidates = CPU, FREE
    for seed in range(2):
        found = answers(machine, candidates, wrong(machine.costs, *factors), ranks, seed, count=2)
        assert max(found) < bound(machine)


@pytest.mark.parametrize("name", ["cpu", "int4"])
@pytest.mark.parametrize("steps", [0.1, 0.5])
def test_what_no_pass_shows_costs_no_more(name, steps):
    """Rounds take a share of a plain step longer than the sum of their passes."""
    machine, candidates, thought, marginal = MACHINES[name]
    slow = replace(machine, host=machine.host + steps * machine.costs.verify_ms(1))
    for seed, ranks in itertools.product(range(2), (HOPELESS, marginal)):
        assert max(answers(slow, candidates, thought, ranks, seed, count=2)) < bound(slow)


@pytest.mark.parametrize("name", ["cpu", "int4"])
def test_a_machine_that_gets_slower_on_the_way_costs_no_more(name):
    machine, candidates, thought, marginal = MACHINES[name]
    slow = replace(machine, slower_after=machine.before + 60 * machine.costs.verify_ms(1))
    for seed, ranks in itertools.product(range(2), (HOPELESS, marginal)):
        assert (
            max(answers(slow, candidates, thought, ranks, seed, count=2)) < bound(machine) + 0.02
        )  # steps are told apart late


@pytest.mark.parametrize("name", ["cpu", "h200", "int4"])
@pytest.mark.parametrize("num_tokens", [7, 8, 16, 32])
def test_short_answers_are_plain_whatever_the_draft_is_worth(name, num_tokens):
    machine, candidates, thought, _ = MACHINES[name]
    for ranks in (GOOD, HOPELESS):
        assert answers(machine, candidates, thought, ranks, 1, num_tokens=num_tokens) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("name", "first", "later"), [("h200", 0.75, 0.90), ("int4", 0.78, 0.93), ("cpu", 0.2, 0.35)])
def test_a_good_draft_gains_nearly_what_the_best_fixed_tree_does(name, first, later):
    """Shares of that gain, medians of 9 texts; the best tree is begun with at once and known beforehand."""
    machine, candidates, thought, _ = MACHINES[name]
    best = min(machine.costs.round_ms(shape) / worth(shape, GOOD) for shape in candidates)
    plain_ms = machine.costs.verify_ms(1)
    gain = (255 * (plain_ms - best) - machine.start) / (machine.before + 255 * plain_ms)
    found = [answers(machine, candidates, thought, GOOD, seed, count=2) for seed in range(9)]
    assert 1 - statistics.median(each[0] for each in found) > first * gain
    assert 1 - statistics.median(each[1] for each in found) > later * gain


def test_a_plain_step_is_seen_before_anything_is_drafted():
    chooser = Auto(Pace(wrong(CPU.costs, plain=2)), FREE, start=policy.NO_START)
    assert chooser.choose(99).topology == PLAIN
