"""Acceptance: greedy by example, sampling in closed form."""

import itertools
from collections import defaultdict

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specvlm import verify
from specvlm.config import SamplingConfig

VOCAB = 4


class Script:
    """Dice that follow one branch: the choices so far are replayed, the next new one takes its first outcome."""

    def __init__(self, choices):
        self.choices, self.place, self.weight, self.open = choices, 0, 1.0, []

    def _choose(self, probs):
        if self.place == len(self.choices):
            self.open += [[*self.choices, other] for other in range(1, len(probs)) if probs[other] > 0]
            self.choices = [*self.choices, 0]
        outcome = self.choices[self.place]
        self.place += 1
        self.weight *= probs[outcome]
        return outcome

    def happens(self, probability):
        probability = min(1.0, max(0.0, probability))
        return self._choose([probability, 1 - probability]) == 0

    def draw(self, probs):
        return self._choose(probs.tolist())


def outcomes(function):
    """Return {result: probability} of a function of dice, over all their outcomes."""
    total, todo = defaultdict(float), [[]]
    while todo:
        script = Script(todo.pop())
        total[function(script)] += 0.0 if script.weight == 0 else script.weight
        todo += script.open
    return total


def distributions(count, seed, zeros=0):
    probs = torch.rand(count, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    for row in range(count):
        probs[row, [(row + i) % VOCAB for i in range(zeros)]] = 0
    return probs / probs.sum(-1, keepdim=True)


def children_drawn(probs, count):
    """Return [(children, probability)] of drawing without replacement from probs [vocab]."""
    drawn = []
    for tokens in itertools.permutations(range(VOCAB), count):
        probability, left = 1.0, 1.0
        for token in tokens:
            probability *= probs[token].item() / left if left > 0 else 0.0
            left -= probs[token].item()
        if probability > 0:
            drawn.append((tokens, probability))
    return drawn


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("zeros", [0, 1])
def test_one_level_leaves_the_targets_distribution(width, zeros):
    """All children drawn from the draft, all dice: the first token is distributed as the target's, to 1e-12."""
    target, draft = distributions(width + 1, 0), distributions(width + 1, 1, zeros)
    law = torch.zeros(VOCAB, dtype=torch.float64)
    for tokens, probability in children_drawn(draft[0], width):
        for accepted, weight in outcomes(
            lambda dice, tokens=tokens: verify.accept_sampled(target, draft, tokens, [-1] * width, dice)
        ).items():
            law[accepted.token_ids[0]] += probability * weight
    torch.testing.assert_close(law, target[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [(0,), (2, 1), (3, 0, 2)])
def test_tokens_proposed_with_certainty_leave_the_targets_distribution(tokens):
    """A drafter that gives no probabilities, such as a lookup: every child is a sure proposal."""
    for target in (distributions(len(tokens) + 1, 0), distributions(len(tokens) + 1, 0, zeros=2)):
        law = torch.zeros(VOCAB, dtype=torch.float64)
        for accepted, weight in outcomes(
            lambda dice, t=target: verify.accept_sampled(t, None, tokens, [-1] * len(tokens), dice)
        ).items():
            law[accepted.token_ids[0]] += weight
        torch.testing.assert_close(law, target[0], rtol=0, atol=1e-12)


def test_a_token_that_the_target_excludes_is_never_accepted():
    target, draft = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1e-9], [0.0, 0.0]])
    law = outcomes(lambda dice: verify.accept_sampled(target, draft, [1], [-1], dice))
    assert {accepted.token_ids for accepted, weight in law.items() if weight > 0} == {(0,)}


def test_two_levels_leave_the_targets_joint_distribution():
    """Tree 0, 1, 00, 01 over a Markov target: the first two tokens together have the target's law, to 1e-12."""
    target, draft = distributions(VOCAB + 1, 2), distributions(VOCAB + 1, 3)  # row 0: the start, row t + 1: after t
    parents = [-1, -1, 0, 0]
    law = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for (first, second), p in children_drawn(draft[0], 2):
        for (third, fourth), q in children_drawn(draft[first + 1], 2):
            tokens = [first, second, third, fourth]
            rows = [0] + [token + 1 for token in tokens]
            for accepted, weight in outcomes(
                lambda dice, tokens=tokens, rows=rows: verify.accept_sampled(
                    target[rows], draft[rows], tokens, parents, dice
                )
            ).items():
                one, *rest = accepted.token_ids
                follow = torch.eye(VOCAB, dtype=torch.float64)[rest[0]] if rest else target[one + 1]
                law[one] += p * q * weight * follow
    expected = target[0][:, None] * target[1:]
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)


def test_a_draft_equal_to_the_target_is_always_accepted():
    target = distributions(4, 4)
    parents = [-1, 0, 1]
    for tokens in itertools.product(range(VOCAB), repeat=3):
        for accepted in outcomes(lambda dice, t=tokens: verify.accept_sampled(target, target, t, parents, dice)):
            assert accepted.nodes == (0, 1, 2)


def test_children_are_drawn_without_replacement():
    """Chi-square over the 12 ordered pairs, 20,000 draws: statistic above 45 has probability 5e-6 under the law."""
    probs = distributions(1, 5)
    drawn = verify.Dice(7).draw_children(probs.float().expand(20_000, VOCAB), 2)
    law = dict(children_drawn(probs[0], 2))
    statistic = 0.0
    for pair, probability in law.items():
        count = (drawn == torch.tensor(pair)).all(1).sum().item()
        statistic += (count - 20_000 * probability) ** 2 / (20_000 * probability)
    assert statistic < 45


def test_no_child_of_zero_probability_is_drawn():
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    drawn = verify.Dice(0).draw_children(probs, 3)
    assert drawn[0].tolist() == [1, -1, -1]
    assert sorted(drawn[1].tolist()) == [-1, 0, 2]


@pytest.mark.parametrize(
    ("choices", "nodes", "token_ids"),
    [
        ((3, 0, 0, 0, 0), (), (3,)),  # nothing agrees: the bonus token alone
        ((1, 0, 2, 0, 0), (1,), (1, 2)),
        ((0, 2, 0, 1, 0), (0, 2), (0, 2, 1)),  # node 2 is the first child of node 0
        ((0, 3, 0, 0, 1), (0, 3), (0, 3, 1)),
    ],
)
def test_greedy_keeps_the_longest_path_that_agrees(choices, nodes, token_ids):
    accepted = verify.accept_greedy(choices, [0, 1, 2, 3], [-1, -1, 0, 0])
    assert accepted == verify.Accepted(nodes, token_ids)


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 20, "top_p": 0.6, "min_p": 0.05},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.6), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_the_distribution_is_that_of_transformers(settings, processors):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = LogitsProcessorList(processors)(None, logits.clone()).softmax(-1)
    torch.testing.assert_close(verify.logits_to_probs(logits, SamplingConfig(**settings)), expected)


def test_the_penalty_counts_each_rows_own_path():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    prompt, tokens = [7, 7, 2], torch.tensor([4, 5, 6])
    paths = verify.path_pairs((-1, -1, 0), torch.device("cpu"))
    seen = verify.seen_tokens(verify.seen_in(torch.tensor(prompt), 10), tokens, *paths)
    ours = verify.penalise(logits, seen, 1.5)
    theirs = RepetitionPenaltyLogitsProcessor(1.5)
    for row, path in enumerate([[], [4], [5], [4, 6]]):
        expected = theirs(torch.tensor([prompt + path]), logits[row : row + 1].clone())
        torch.testing.assert_close(ours[row : row + 1], expected)
