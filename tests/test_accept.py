"""Acceptance: the longest path that agrees; sampling by noise: its law, and that a draft cannot change the text."""

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

from specvlm.core import tree
from specvlm.core.config import SamplingConfig
from specvlm.core.rows import Rows
from specvlm.speculate import accept as accepting
from specvlm.speculate.accept import Accepted, Chooser, Draft, Verifier, accept, gumbel

PROBS = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)


def sampled(**settings):
    return Chooser(SamplingConfig(**{"temperature": 1.0, "seed": 7, **settings}))


@pytest.mark.parametrize(("probs", "steps"), [((0.8, 0.2), 2000), ((0.6, 0.4), 2000), ((0.55, 0.35, 0.1), 150)])
def test_the_choice_follows_the_targets_distribution_over_all_noise(probs, steps, monkeypatch):
    """The law in closed form: noise over the midpoints of a fine grid of uniforms, all combinations.

    A cell of the grid counts wrong only where the border between two choices cuts it, which is a share of at most
    (tokens - 1) * 2 / steps.
    """
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    noise = torch.cartesian_prod(*[-(-uniform.log()).log()] * len(probs))
    monkeypatch.setattr(accepting, "gumbel", lambda seed, places, vocab_size: noise)
    logits = torch.tensor(probs, dtype=torch.float64).log()[None]
    choice = sampled().scores(logits, torch.zeros(1)).argmax(-1)
    law = torch.bincount(choice, minlength=len(probs)) / len(noise)
    bound = (len(probs) - 1) * 2 / steps
    torch.testing.assert_close(law.double(), torch.tensor(probs, dtype=torch.float64), rtol=0, atol=bound)


def test_the_noise_of_neighbouring_places_tokens_and_seeds_is_independent_and_uniform():
    """Chi-square over 64 x 64 cells of 262,144 pairs, 4,095 degrees of freedom, by chance above 4,590 in 1e-7."""

    def uniforms(seed, first, skip):
        return torch.exp(-torch.exp(-gumbel(seed, torch.arange(first, first + 512), 512 + skip)[:, skip:]))

    for other in (uniforms(3, 1, 0), uniforms(3, 0, 1), uniforms(4, 0, 0)):
        cells = (uniforms(3, 0, 0) * 64).long() * 64 + (other * 64).long()
        counts = torch.bincount(cells.flatten(), minlength=64 * 64).double()
        statistic = ((counts - 64) ** 2 / 64).sum()
        assert 3600 < statistic < 4590


def test_sampled_choices_follow_the_law_place_by_place():
    """Chi-square over 20,000 places and pairs of them: above 31 (3 degrees) or 56 (15) in about 1e-6 by chance."""
    scores = sampled().scores(PROBS.log().expand(20_000, 4), torch.arange(20_000))
    choice = scores.argmax(-1)
    counts = torch.bincount(choice, minlength=4).double()
    assert ((counts - 20_000 * PROBS) ** 2 / (20_000 * PROBS)).sum() < 31
    expected = 10_000 * torch.outer(PROBS, PROBS).flatten()
    pairs = torch.bincount(choice[::2] * 4 + choice[1::2], minlength=16).double()
    assert ((pairs - expected) ** 2 / expected).sum() < 56


def test_the_noise_depends_on_seed_place_and_token_alone():
    noise = gumbel(5, torch.tensor([8, 9, 8]), 100)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, gumbel(torch.tensor(5), torch.tensor([8, 9, 8]), 130)[:, :100])
    assert not torch.equal(noise, gumbel(6, torch.tensor([8, 9, 8]), 100))
    assert noise.isfinite().all()


def test_a_token_that_the_filters_exclude_is_never_chosen():
    logits = PROBS.log().float().expand(5_000, 4)
    for settings in ({"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.5}):
        choice = sampled(**settings).scores(logits, torch.arange(5_000)).argmax(-1)
        assert set(choice.tolist()) == {0, 1}


def test_greedy_scores_are_the_logits():
    logits = torch.randn(3, 8)
    assert Chooser(SamplingConfig()).scores(logits, torch.arange(3)) is logits


def test_whatever_is_drafted_the_sampled_text_is_the_plain_one():
    """A Markov target; drafts of random tokens in random trees, some of them the tokens that will be chosen."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(12, 12, generator=generator) * 2  # row: the logits after this token

    def text(drafts):
        verifier, ids = Verifier(SamplingConfig(temperature=0.9, seed=4), torch.zeros(12, dtype=torch.bool)), [3]
        while len(ids) < 200:
            draft = drafts()
            tokens = torch.cat([torch.tensor(ids[-1:]), draft.tokens])
            ids += verifier.accept(target[tokens], draft).token_ids
        return ids[:200], len(ids)

    def any_tree():
        parents = tree.parse("paper").parents
        return Draft.of(torch.randint(0, 12, (25,), generator=generator).tolist(), parents)

    plain, _ = text(Draft.empty)
    assert text(any_tree)[0] == plain
    assert text(lambda: Draft.of(list(range(12)) * 2, [-1] * 12 + [5] * 12))[0] == plain
    other = Verifier(SamplingConfig(temperature=0.9, seed=5), torch.zeros(12, dtype=torch.bool))
    ids = [3]
    while len(ids) < 200:
        ids += other.accept(target[ids[-1:]], Draft.empty()).token_ids
    assert ids != plain


@pytest.mark.parametrize(
    ("choices", "nodes", "token_ids"),
    [
        ((3, 0, 0, 0, 0), (), (3,)),  # nothing agrees: the bonus token alone
        ((1, 0, 2, 0, 0), (1,), (1, 2)),
        ((0, 2, 0, 1, 0), (0, 2), (0, 2, 1)),  # node 2 is the first child of node 0
        ((0, 3, 0, 0, 1), (0, 3), (0, 3, 1)),
    ],
)
def test_the_longest_path_that_agrees_is_kept(choices, nodes, token_ids):
    assert accept(choices, [0, 1, 2, 3], [-1, -1, 0, 0]) == Accepted(nodes, token_ids)


def test_of_siblings_with_the_same_token_the_longer_path_stands():
    assert accept([5, 6, 6, 9], [5, 5, 6], [-1, -1, 1]) == Accepted((1, 2), (5, 6, 9))
    assert accept([5, 7, 8], [5, 5], [-1, -1]) == Accepted((0,), (5, 7))  # of equal ones the first


def test_empty_places_are_never_accepted():
    assert accept([4, 5, 6], [4, -1], [-1, 0], [1, 2]) == Accepted((0,), (4, 5), (1, 2))


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
    torch.testing.assert_close(accepting.logits_to_probs(logits, SamplingConfig(**settings)), expected)


def test_the_penalty_counts_each_rows_own_path():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    prompt, tokens = [7, 7, 2], torch.tensor([4, 5, 6])
    sees = Rows.of((-1, 0, 0, 1), 4, torch.device("cpu")).sees[:, 1:]
    seen = accepting.seen_before(accepting.seen_in(torch.tensor(prompt), 10), tokens, sees)
    ours = accepting.penalise(logits, seen, 1.5)
    theirs = RepetitionPenaltyLogitsProcessor(1.5)
    for row, path in enumerate([[], [4], [5], [4, 6]]):
        expected = theirs(torch.tensor([prompt + path]), logits[row : row + 1].clone())
        torch.testing.assert_close(ours[row : row + 1], expected)
