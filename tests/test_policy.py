"""What is drafted: costs, expectations against brute force, and simulated texts.

The simulations play the target with dice that know how often it takes which candidate. Every random assertion states
how often it failed among seeds that the test does not use.
"""

import dataclasses
import itertools
import math
import random
import statistics
import sys

import numpy as np
import pytest

from specvlm.core import tree
from specvlm.core.errors import ConfigError
from specvlm.speculate import policy
from specvlm.speculate.pace import Costs, Pace
from specvlm.speculate.policy import NUM_RANKS, PLAIN, Acceptance, Auto, Choice, Fixed, Observation, Shape

GOOD = (0.70, 0.12, 0.05, 0.03)
HOPELESS = (0.05, 0.02, 0.01, 0.01)
VERIFY = {1: 17.3, 2: 17.4, 4: 17.5, 8: 17.7, 16: 18.5, 24: 19.2, 32: 19.8, 48: 21.0, 64: 22.0}  # 32B on an H200
BF16 = Costs(VERIFY, 4.3, {1: 4.2, 4: 4.2, 8: 4.3})  # a 7B draft
QUANT = Costs(VERIFY, 2.1, {1: 2.0, 4: 2.0, 8: 2.0})  # the same draft, quantised
SELF = Costs(VERIFY, 5.2, {1: 5.0, 4: 5.0, 8: 5.2})  # the target itself in 4 bit
SHAPES = policy.shapes(10, 63, sorted(VERIFY))
LATE = policy.Start(0.0, 2000.0, lambda done, left: left, lambda tokens: True, catches_up=False)  # behind a video


def grown(ranks, shape):
    """Return the paths of a Shape's nodes and of its rows, grown one by one as the module's words say."""
    worth = {(): 1.0}
    rows, seen = [()], []
    for depth in range(1, shape.depth + 1):
        if depth > 1:
            rows = sorted((path for path in seen if len(path) == depth - 1), key=worth.get, reverse=True)[: shape.width]
        for path in rows:
            for rank in range(NUM_RANKS):
                worth[(*path, rank)] = worth[path] * ranks[depth - 1][rank]
                seen.append((*path, rank))
    nodes = sorted(seen, key=worth.get, reverse=True)[: shape.nodes]
    ran = {path[:-1] for path in seen}
    return {path: worth[path] for path in nodes}, ran


def paths_of(topology):
    found = []
    for parent, rank in zip(topology.parents, topology.ranks, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), rank))
    return found


class World:
    """A target that takes the draft's rank r with probability ranks[r], whatever went before."""

    def __init__(self, ranks, costs, seed):
        self.ranks, self.costs, self.random = ranks, costs, random.Random(seed)
        self._grown = {}

    def round(self, topology):
        """Return (observations, tokens) of a round."""
        if not len(topology):
            return [], 1
        key = (topology, self.ranks)
        if key not in self._grown:
            if isinstance(topology, Shape):
                nodes, ran = grown([self.ranks] * topology.depth, topology)
            else:
                nodes = paths_of(topology)
                ran = {path[:-1] for path in nodes}
            self._grown[key] = set(nodes), ran
        nodes, ran = self._grown[key]
        path, seen = (), []
        while True:
            (hit,) = self.random.choices([*range(NUM_RANKS), None], [*self.ranks, 1 - sum(self.ranks)])
            offered = NUM_RANKS
            if isinstance(topology, tree.Tree):
                offered = sum(node[:-1] == path for node in nodes)
            if path in ran:
                shown = hit if hit is not None and hit < offered else None
                seen.append(Observation(len(path) + 1, shown, (2,) * offered))
            if hit is None or (*path, hit) not in nodes:
                return seen, len(path) + 1
            path = (*path, hit)


def auto(costs, candidates, acceptance=None, **kwargs):
    """Return a chooser that knows what a plain step takes."""
    pace = Pace(costs)
    pace.learn(PLAIN, costs.verify_ms(1))
    return Auto(pace, candidates, acceptance, **{"start": LATE, **kwargs})


def tried(chooser):
    """Return the chooser behind its first probe, which missed."""
    choice = chooser.choose(99)
    assert choice.is_probe
    chooser.learn(choice, [Observation(1, None)], 1)
    return chooser


def play(world, chooser, num_tokens):
    """Return (milliseconds, choices) of a text."""
    left, spent, choices = num_tokens, 0.0, []
    while left > 0:
        choice = chooser.choose(left - 1)
        seen, tokens = world.round(choice.topology)
        tokens = min(tokens, left)
        chooser.learn(choice, seen, tokens)
        left -= tokens
        spent += world.costs.round_ms(choice.topology)
        choices.append(choice)
    return spent, choices


class Known(Acceptance):
    """An acceptance that stands fast."""

    def __init__(self, ranks):
        super().__init__()
        self.version = 1  # as if something had been learnt
        self.ranks = ranks

    def by_depth(self, depth):
        return np.array([self.ranks[min(at, len(self.ranks) - 1)] for at in range(depth)])


def expected(topology, *ranks):
    return Fixed(topology, acceptance=Known(ranks)).choose(99).expected_tokens


def worth(topology, ranks):
    """Return the expected tokens of a round where every depth has these ranks, by growing the tree."""
    return 1 + sum(grown([ranks] * topology.depth, topology)[0].values())


def ms_a_token(topology, ranks, costs):
    return costs.round_ms(topology) / worth(topology, ranks)


def best_fixed(ranks, costs):
    return min(SHAPES, key=lambda shape: ms_a_token(shape, ranks, costs))


# Costs and candidates


def test_times_between_measured_rows_lie_on_a_line_and_beyond_them_on_the_last():
    costs = Costs({1: 10.0, 3: 14.0, 5: 15.0}, 2.0, {2: 1.0})
    assert [costs.verify_ms(rows) for rows in (1, 2, 3, 4, 5, 9)] == [10, 12, 14, 14.5, 15, 17]
    assert [costs.level_ms(rows) for rows in (1, 2, 8)] == [1, 1, 1]


def test_noise_does_not_make_a_larger_pass_cheaper():
    assert Costs({1: 10.0, 2: 9.0}, 0, {1: 1}).verify_ms(50) == 9


@pytest.mark.parametrize(
    ("topology", "passes", "rows"),
    [
        (Shape(1, 1, 3), [], 4),
        (Shape(4, 1, 7), [1, 1, 1], 8),
        (Shape(4, 8, 31), [4, 8, 8], 32),
        (tree.parse("chain:3"), [1, 1], 4),
        (tree.parse("paper"), [4, 4, 1, 1], 26),
    ],
)
def test_a_round_costs_its_passes(topology, passes, rows):
    costs = Costs({1: 100.0, 2: 200.0}, 7.0, {1: 1.0, 2: 11.0})  # 100 a row of the target, 10 a row more of the draft
    assert costs.round_ms(topology) == 7 + sum(10 * count - 9 for count in passes) + 100 * rows


def test_a_round_without_nodes_costs_a_plain_step():
    assert BF16.round_ms(PLAIN) == BF16.round_ms(tree.Tree((), ())) == 17.3


def test_shapes_are_few_and_can_be_filled():
    found = policy.shapes(10, 40, [*VERIFY, 500])
    assert len(set(found)) == len(found) <= 100
    assert {shape.nodes for shape in found} == {1, 3, 7, 15, 23, 31}
    assert {shape.width for shape in found} == set(policy.WIDTHS)
    for shape in found:
        nodes, _ = grown([GOOD] * shape.depth, shape)
        assert len(nodes) == shape.nodes >= shape.depth >= 1
    assert policy.shapes(3, 3, [2, 4]) == [Shape(1, 1, 1), Shape(1, 1, 3), Shape(2, 1, 3), Shape(3, 1, 3)]


# Expected tokens


def test_no_tree_of_that_many_nodes_is_expected_to_bring_more():
    first, second = (0.5, 0.2, 0.15, 0.1), (0.4, 0.3, 0.05, 0.02)
    probs = {(rank,): first[rank] for rank in range(4)}
    probs |= {(rank, below): first[rank] * second[below] for rank in range(4) for below in range(4)}
    for size in (1, 2, 3, 4):
        trees = (nodes for nodes in itertools.combinations(probs, size) if all(n[:-1] in (*nodes, ()) for n in nodes))
        best = max(sum(probs[node] for node in nodes) for nodes in trees)
        assert expected(Shape(2, 4, size), first, second) == pytest.approx(1 + best)


def test_every_candidate_is_expected_to_bring_what_its_grown_tree_does():
    dice = np.random.default_rng(0)
    ranks = [sorted(dice.dirichlet((5, 2, 1, 1, 3))[:4], reverse=True) for _ in range(10)]
    for shape in SHAPES:
        nodes, _ = grown(ranks, shape)
        assert expected(shape, *ranks) == pytest.approx(1 + sum(nodes.values()))


def test_static_trees_are_expected_to_bring_the_sum_over_their_paths():
    assert expected(tree.parse("paper"), GOOD) == pytest.approx(1 + 2.75, abs=0.005)
    assert expected(tree.parse("0,1,00,10"), (0.5, 0.2, 0, 0), (0.4, 0, 0, 0)) == pytest.approx(1 + 0.7 * 1.4)
    ranks_that_nobody_counts = tree.parse("0,1,2,3,4,40")
    assert expected(ranks_that_nobody_counts, GOOD) == pytest.approx(1.9)


def test_shapes_and_trees_are_compared_in_one_list():
    mixed = [tree.parse("paper"), Shape(3, 4, 15), tree.parse("chain:2"), PLAIN, Shape(2, 1, 7)]
    for costs in (BF16, QUANT, SELF):
        chosen = auto(costs, mixed, Known([GOOD])).choose(99)
        rates = {topology: costs.round_ms(topology) / expected(topology, GOOD) for topology in mixed if len(topology)}
        assert chosen.topology == min(rates, key=rates.get)
        assert chosen.ms / chosen.expected_tokens == pytest.approx(min(rates.values()))


def test_the_best_of_all_shapes_is_chosen():
    dice = np.random.default_rng(1)
    for _ in range(4):
        ranks = sorted(dice.dirichlet((9, 2, 1, 1, 3))[:4], reverse=True)
        for costs in (BF16, QUANT, SELF):
            best = best_fixed(ranks, costs)
            chosen = auto(costs, SHAPES, Known([ranks])).choose(99)
            assert (chosen.topology, chosen.expected_tokens) == (best, pytest.approx(worth(best, ranks)))


# Acceptance


def test_acceptance_starts_from_the_prior_and_the_drafts_own_word():
    acceptance = Acceptance()
    np.testing.assert_allclose(acceptance.by_depth(3), [(0.6, 0.12, 0.05, 0.03)] * 3)
    confidence = acceptance.by_confidence()
    assert confidence.shape == (NUM_RANKS, policy.NUM_BINS)
    edges = (1.0, *policy.BIN_EDGES, 0.0)
    for place, prob in enumerate(confidence[2]):
        assert edges[place] > prob > edges[place + 1]


def test_acceptance_finds_the_ranks():
    acceptance, world = Acceptance(), World(GOOD, BF16, 1)
    found = []
    for _ in range(1000):
        acceptance.learn(world.round(Shape(4, 4, 31))[0])
        found.append(acceptance.by_depth(4))
    # the mean over 1000 rounds: the worst of 300 other seeds was off by 0.052
    np.testing.assert_allclose(np.mean(found, 0), [GOOD] * 4, atol=0.06)


def test_only_what_was_observed_is_forgotten():
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.learn([Observation(1, 0), Observation(2, 1)])
    deep = acceptance.by_depth(2)
    assert deep[0, 0] > 0.75 > 0.25 > deep[0, 1]  # the pool draws both depths together
    assert deep[1, 1] > 0.75 > 0.25 > deep[1, 0]
    for _ in range(30):
        acceptance.learn([Observation(1, 0)])
    assert acceptance.by_depth(2)[1, 1] > 0.5


def test_a_round_that_observed_nothing_changes_nothing():
    acceptance = Acceptance()
    acceptance.learn([Observation(1, 0, (3, 4))])
    before = acceptance.by_depth(2), acceptance.by_confidence(), acceptance.version
    acceptance.learn([])
    assert (acceptance.by_depth(2) == before[0]).all()
    assert (acceptance.by_confidence() == before[1]).all()
    assert acceptance.version == before[2]


def test_depths_never_seen_follow_the_others():
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.learn([Observation(1, 2)])
    assert acceptance.by_depth(9)[8, 2] > 0.95


def test_a_row_never_promises_certainty():
    acceptance = Acceptance()
    for at in range(100):
        acceptance.learn([Observation(1, 0, (0,)), Observation(2, at % 2)])
        assert acceptance.by_depth(5).sum(1).max() <= 1 - 1e-3 + 1e-12


@pytest.mark.parametrize("was_good", [True, False])
def test_four_surprises_in_a_row_overthrow_what_was_known(was_good):
    acceptance, usual, other = Acceptance(), 0 if was_good else None, None if was_good else 0
    for _ in range(200):
        acceptance.learn([Observation(1, usual)])
    for _ in range(3):
        acceptance.learn([Observation(1, other)])
    assert (acceptance.by_depth(1)[0, 0] > 0.5) == was_good  # three may come by chance
    acceptance.learn([Observation(1, other)])
    now = acceptance.by_depth(1)[0, 0]
    assert now < 0.1 if was_good else now > 0.9


def test_what_has_become_usual_overthrows_nothing_more():
    acceptance = Acceptance()
    for hit in [0] * 200 + [None] * 12 + [0]:
        acceptance.learn([Observation(1, hit)])
    assert acceptance.by_depth(1)[0, 0] < 0.25  # one hit among many misses, not among the latest


def test_ranks_that_were_not_offered_are_not_judged():
    acceptance = Acceptance()
    for _ in range(2000):
        acceptance.learn([Observation(1, None, (0,))])
    found = acceptance.by_depth(1)[0]
    assert found[0] < 0.01
    np.testing.assert_allclose(found[1:], (0.12, 0.05, 0.03))
    acceptance.learn([Observation(1, 6, (0,) * 8)])  # a wide static tree: a rank that nobody counts
    assert acceptance.by_depth(1)[0, 1] < 0.12


def test_confidence_is_learnt_by_rank_and_bin_and_slowly_forgotten():
    acceptance = Acceptance()
    start = acceptance.by_confidence()
    for _ in range(20):
        acceptance.learn([Observation(1, 1, (4, 4, 5)), Observation(2, None, (0,))])
    learnt = acceptance.by_confidence()
    assert learnt[1, 4] > 0.8
    assert learnt[0, 4] < 0.05
    assert learnt[0, 0] < 0.25
    assert learnt[2, 5] < 0.02
    untouched = np.ones_like(start, dtype=bool)
    untouched[[1, 0, 0, 2], [4, 4, 0, 5]] = False
    assert (learnt[untouched] == start[untouched]).all()
    for _ in range(30):
        acceptance.learn([Observation(1, None)])
    assert 0.5 < acceptance.by_confidence()[1, 4] < learnt[1, 4] - 0.05


# Choices


@pytest.mark.parametrize("left", range(8))
def test_nothing_deeper_than_what_may_be_accepted_is_drafted(left):
    choice = auto(QUANT, SHAPES, Known([(0.9, 0.05, 0.02, 0.01)])).choose(left)
    assert choice.topology.depth == min(left, choice.topology.depth)
    assert choice.topology.depth == left or left > 4
    assert (choice.topology == PLAIN) == (left == 0)


def test_fixed_is_fixed():
    paper = tree.parse("paper")
    chooser = Fixed(paper)
    for left in (1, 99):
        assert chooser.choose(left).topology is paper
    assert chooser.choose(0).topology == PLAIN
    assert Fixed(PLAIN).choose(99).topology == PLAIN
    before = chooser.choose(9).expected_tokens
    chooser.learn(chooser.choose(9), [Observation(1, None)], 1)
    assert chooser.choose(9).expected_tokens < before


def test_a_draft_that_can_never_pay_is_never_probed():
    costs = Costs({1: 10.0, 64: 10.0}, 10.0, {1: 10.0})  # a draft as slow as its target
    chooser = auto(costs, SHAPES)
    spent, choices = play(World(GOOD, costs, 0), chooser, 100)
    assert spent == 1000
    assert choices[0].explain() == "plain: no tree fits or could pay"


def test_probes_come_at_their_interval_and_go_on_while_they_hit():
    interval = math.ceil((BF16.round_ms(Shape(1, 1, 3)) - 17.3) / (0.015 * 17.3))
    chooser = tried(auto(BF16, SHAPES, Known([HOPELESS])))

    def plain_steps():
        for waited in range(interval):
            choice = chooser.choose(99)
            assert (choice.topology, choice.probe_in) == (PLAIN, interval - waited)
            chooser.learn(choice, [], 1)

    def probe(hit):
        choice = chooser.choose(99)
        assert (choice.is_probe, choice.topology.depth) == (True, 1)
        chooser.learn(choice, [Observation(1, hit)], 1 if hit is None else 2)

    for hits in ([None], [None], [0, 3, None], [None]):
        plain_steps()
        for hit in hits:
            probe(hit)


def test_a_draft_of_which_nothing_is_known_is_probed_at_once():
    chooser = tried(auto(BF16, SHAPES, Known([HOPELESS])))
    assert not chooser.choose(99).is_probe
    chooser.acceptance.version = 0
    assert chooser.choose(99).is_probe


def test_rounds_that_take_longer_than_measured_are_chosen_less():
    """Drafting rounds at twice their measured time, a plain step as measured: what paid by a little pays no more."""
    chooser = auto(BF16, SHAPES, Known([(0.5, 0.1, 0.05, 0.03)]))
    choice = chooser.choose(99)
    assert len(choice.topology)
    assert choice.ms / choice.expected_tokens > 17.3 / 2

    def rounds(count, slower, plain_ms):
        for _ in range(count):
            choice = chooser.choose(99)
            ms = slower * BF16.round_ms(choice.topology) if len(choice.topology) else plain_ms
            chooser.learn(choice, [Observation(1, 0)] if len(choice.topology) else [], 2, ms)

    rounds(60, 2, 17.3)
    later = chooser.choose(99)
    assert later.topology == PLAIN or later.is_probe
    assert later.plain_ms == pytest.approx(17.3, rel=0.05)
    rounds(60, 2, 3 * 17.3)  # now the whole machine is slower
    assert len(chooser.choose(99).topology)
    assert 17.3 < chooser.choose(99).plain_ms < 3 * 17.3


def test_a_time_that_says_nothing_changes_nothing():
    chooser = auto(BF16, SHAPES, Known([GOOD]))
    choice = chooser.choose(99)
    for _ in range(20):
        chooser.learn(choice, [], 2)
    assert chooser.choose(99) == choice


def test_a_round_that_could_propose_nothing_is_no_probe():
    """Lookup without a match: the next round may try again, and what could not be tried is still due."""
    chooser = auto(BF16, SHAPES, Known([HOPELESS]))
    chooser.acceptance.version = 0
    for _ in range(5):
        choice = chooser.choose(99)
        assert choice.is_probe
        chooser.learn(choice, [], 1)
    chooser.acceptance.version = 1
    for _ in range(200):
        chooser.learn(chooser.choose(99), [], 1)
    assert chooser.choose(99).is_probe


def test_two_choosers_of_one_acceptance_learn_from_each_other():
    acceptance = Acceptance()
    acceptance.learn([Observation(1, 0)])
    short, long = auto(BF16, SHAPES, acceptance), auto(BF16, SHAPES, acceptance)
    assert len(long.choose(99).topology)
    for _ in range(5):
        short.learn(short.choose(99), [Observation(1, None)], 1)
    assert long.choose(99).topology == PLAIN or long.choose(99).is_probe


def test_where_no_shallow_tree_is_offered_the_shallowest_is_probed():
    trees = [tree.parse("paper"), tree.parse("chain:4"), tree.parse("chain:3")]
    chooser = auto(QUANT, trees, Known([HOPELESS]))
    choices = play(World(HOPELESS, QUANT, 0), chooser, 256)[1]
    assert {choice.topology for choice in choices} == {PLAIN, trees[2]}


def test_a_probe_is_shallow_though_a_deeper_tree_were_nearer_to_paying():
    costs = Costs(VERIFY, 9.0, {1: 0.1})
    chooser = tried(auto(costs, SHAPES, Known([(0.3, 0.04, 0.02, 0.01)])))
    for _ in range(chooser.choose(99).probe_in):
        choice = chooser.choose(99)
        assert choice.best_ms < costs.round_ms(Shape(1, 1, 3)) / 1.37
        chooser.learn(choice, [], 1)
    assert chooser.choose(99).is_probe
    assert chooser.choose(99).topology.depth == 1


def test_probes_that_cost_nothing_leave_some_plain_tokens_between():
    choice = tried(auto(Costs(VERIFY, 0.1, {1: 4.0}), SHAPES, Known([(0.001,) * 4]))).choose(99)
    assert (choice.topology, choice.probe_in) == (PLAIN, 4)


def test_a_choice_explains_itself():
    tree_15, paper = Choice(Shape(5, 4, 15), 3.4, 31.2, 17.4), tree.parse("paper")
    assert tree_15.explain() == "15 nodes, depth 5: 3.4 tokens in 31.2 ms, 9.2 ms a token (plain 17.4)"
    probe = Choice(Shape(1, 1, 1), 1.1, 22.0, 17.4, is_probe=True)
    assert probe.explain() == "probe: 1 node, depth 1: 1.1 tokens in 22.0 ms, 20.0 ms a token (plain 17.4)"
    plain = Choice(PLAIN, 1.0, 17.4, 17.4, best_ms=19.0, probe_in=12)
    words = "plain: the best tree would take 19.0 ms a token (plain 17.4); next probe in 12 tokens"
    assert plain.explain() == words
    assert dataclasses.replace(plain, probe_in=1).explain() == words.replace("12 tokens", "1 token")
    assert Fixed(paper, acceptance=Known([GOOD])).choose(9).explain() == "25 nodes, depth 5: fixed, 3.7 tokens"
    assert Fixed(PLAIN).choose(9).explain() == "plain: no tree fits or could pay"


def test_an_unknown_policy_is_refused():
    policy.check("auto")
    policy.check("fixed")
    with pytest.raises(ConfigError, match="policy='x' is not allowed: known are auto, fixed"):
        policy.check("x")


# Simulated texts


@pytest.mark.parametrize("topology", [Shape(3, 1, 7), Shape(4, 4, 23), tree.parse("paper"), tree.parse("chain:3")])
def test_the_simulated_target_accepts_as_many_as_expected(topology):
    world = World(GOOD, BF16, 5)
    tokens = [world.round(topology)[1] for _ in range(4000)]
    spread = statistics.stdev(tokens) / math.sqrt(len(tokens))
    assert statistics.mean(tokens) == pytest.approx(expected(topology, GOOD), abs=5 * spread)  # false alarms: 6e-7


@pytest.mark.parametrize(
    ("costs", "ranks"),
    [(BF16, GOOD), (QUANT, GOOD), (SELF, (0.90, 0.05, 0.02, 0.01))],
    ids=["bf16", "quantised", "self"],
)
def test_a_good_draft_runs_near_the_best_fixed_shape(costs, ranks):
    excess = []
    for seed in range(25):
        spent = gained = 0.0
        for choice in play(World(ranks, costs, seed), auto(costs, SHAPES), 320)[1]:
            tokens = worth(choice.topology, ranks) if len(choice.topology) else 1.0
            spent, gained = spent + costs.round_ms(choice.topology), gained + tokens
            if gained < 64:
                start = spent, gained
        rate = (spent - start[0]) / (gained - start[1])
        excess.append(rate / ms_a_token(best_fixed(ranks, costs), ranks, costs) - 1)
    # drawn from 600 other seeds, 25 of them break the first bound in 3 of 10,000 cases, the second in 5
    assert statistics.median(excess) < 0.03
    assert statistics.mean(excess) < 0.05


@pytest.mark.parametrize("costs", [BF16, QUANT, SELF], ids=["bf16", "quantised", "self"])
def test_a_hopeless_draft_costs_next_to_nothing(costs):
    shares = [play(World(HOPELESS, costs, seed), auto(costs, SHAPES), 256)[0] / (256 * 17.3) for seed in range(30)]
    # 2 of 3000 other texts were above 1.025, none above 1.027: two of 30 are with a chance of 2e-4
    assert sorted(shares)[-2] < 1.025
    assert max(shares) < 1.035


@pytest.mark.parametrize(
    ("costs", "before", "after", "late"),
    [
        (BF16, GOOD, HOPELESS, 5),
        (QUANT, GOOD, HOPELESS, 11),  # drafting costs so little that a single hit keeps it going
        (BF16, HOPELESS, GOOD, 5),
        (QUANT, HOPELESS, GOOD, 2),
    ],
    ids=["bf16-off", "quantised-off", "bf16-on", "quantised-on"],
)
def test_a_change_is_noticed_within_eight_rounds(costs, before, after, late):
    """Of 40 texts at most `late` need more; of 600 others 2, 9, 2 and 0 % did: false alarms are below 1e-3."""
    num_late = 0
    for seed in range(40):
        world, chooser = World(before, costs, seed), auto(costs, SHAPES)
        play(world, chooser, 150)
        world.ranks = after
        num_late += rounds_until(world, chooser, lambda choice: has_switched(choice, after)) > 8
    assert num_late <= late


def has_switched(choice, ranks):
    if ranks == HOPELESS:
        return choice.is_probe or choice.topology == PLAIN
    return not choice.is_probe and choice.topology.depth >= 2


def rounds_until(world, chooser, is_done):
    """Return the rounds that drafted something before such a choice came, or infinity."""
    rounds = 0
    for _ in range(2000):
        choice = chooser.choose(10**6)
        if is_done(choice):
            return rounds
        seen, tokens = world.round(choice.topology)
        chooser.learn(choice, seen, tokens)
        rounds += len(choice.topology) > 0
    return math.inf


def test_the_first_round_is_modest():
    for costs in (BF16, QUANT, SELF):
        assert 1 <= auto(costs, SHAPES).choose(99).topology.depth <= 3


def test_choosing_is_a_few_calls():
    """A GPU waits for it: what grows with the candidates is worked out in `foresee`, while the GPU is busy."""
    calls = []
    for shapes in (SHAPES, SHAPES[::4]):
        chooser = auto(BF16, shapes)
        seen = [Observation(depth, 0, (0, 3, 5, 6)) for depth in range(1, 6)]
        for _ in range(5):
            choice = chooser.choose(99)
            chooser.foresee()
            chooser.learn(choice, seen, 6, 30.0)
        count = 0

        def heard(frame, event, argument):
            nonlocal count
            count += event == "call"

        sys.setprofile(heard)
        chooser.choose(99)
        sys.setprofile(None)
        calls.append(count)
    assert 0 < calls[0] == calls[1] < 60
