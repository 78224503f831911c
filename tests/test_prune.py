"""Which visual tokens are kept."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm import prune
from specvlm.core.config import PruneConfig
from specvlm.core.errors import ConfigError


def cells(steps, rows, columns):
    return torch.cartesian_prod(torch.arange(steps), torch.arange(rows), torch.arange(columns))


def keep(config, grid, scores=None, visual_id=None):
    total = grid.shape[0]
    scores = torch.zeros(total) if scores is None else scores
    visual_id = torch.zeros(total, dtype=torch.int64) if visual_id is None else visual_id
    return prune.select(scores, grid, visual_id, config)


@pytest.mark.parametrize("name", sorted(prune.PRUNERS))
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1, 0.001])
def test_every_pruner_keeps_ascending_distinct_tokens_within_the_budget(name, ratio):
    grid = cells(8, 6, 7)
    scores = torch.rand(len(grid), generator=torch.Generator().manual_seed(0))
    config = PruneConfig(keep_ratio=ratio, pruner=name)
    kept = keep(config, grid, scores)
    expected = len(grid) if name == "none" else prune.budget(config, len(grid))
    assert kept.shape[0] == expected
    assert (kept.diff() > 0).all()
    assert kept[0] >= 0
    assert kept[-1] < len(grid)


def test_stage_one_is_the_smallest_set_that_covers_the_mass():
    scores = torch.tensor([0.05, 0.3, 0.05, 0.25, 0.05, 0.2, 0.05, 0.05])
    grid = cells(1, 1, 8)
    for mass, stage_one in ((0.3, {1}), (0.31, {1, 3}), (0.55, {1, 3}), (0.56, {1, 3, 5})):
        kept = prune.PRUNERS["verifier"](scores, grid, len(stage_one), mass=mass, focus=1.0)
        assert set(kept.tolist()) == stage_one


def test_stage_one_is_capped_by_the_budget():
    scores = torch.linspace(1, 2, 10)
    kept = keep(PruneConfig(keep_tokens=3, mass=1.0, focus=1.0), cells(1, 1, 10), scores)
    assert kept.tolist() == [7, 8, 9]


def test_stage_one_leaves_a_share_of_the_budget_to_stage_two():
    scores = torch.cat([torch.ones(8) * 2, torch.ones(56)])  # too flat for a mass of 0.4 to be reached by 8 tokens
    grid = cells(1, 8, 8)
    kept = keep(PruneConfig(keep_tokens=8, focus=0.5), grid, scores)
    assert (kept < 8).sum() >= 4
    spread = grid[kept[kept >= 8]]
    assert (spread[:, 1:] // 4).unique(dim=0).shape[0] >= 3


def test_without_attention_the_verifier_is_uniform():
    grid = cells(4, 4, 4)
    config = PruneConfig(keep_ratio=0.25, mass=0.0)
    uniform = keep(PruneConfig(keep_ratio=0.25, pruner="uniform"), grid)
    assert keep(config, grid, torch.rand(64)).tolist() == uniform.tolist()


@pytest.mark.parametrize("wrong", [[0, 1, 2], [0, 0], [-1, 0], [0, 40]])
@pytest.mark.parametrize("per_visual", [False, True])
def test_a_pruner_that_returns_what_it_must_not_is_named(monkeypatch, wrong, per_visual):
    monkeypatch.setitem(prune.PRUNERS, "wrong", lambda scores, grid, count: torch.tensor(wrong))
    config = PruneConfig(pruner="wrong", keep_tokens=2, per_visual=per_visual)
    with pytest.raises(ConfigError, match="indices that are not at most 2 distinct"):
        prune.select(torch.ones(40), cells(10, 2, 2), torch.zeros(40, dtype=torch.int64), config)


def test_grid_spacing_covers_every_block_where_sequence_spacing_meets_one_column():
    grid = cells(8, 8, 8)
    on_grid = grid[keep(PruneConfig(keep_tokens=64, pruner="uniform"), grid)]
    blocks = (on_grid // 2).unique(dim=0)
    assert blocks.shape[0] == 64  # one token in each 2 x 2 x 2 block
    in_sequence = grid[keep(PruneConfig(keep_tokens=64, pruner="uniform", spacing="sequence"), grid)]
    assert in_sequence[:, 2].unique().shape[0] == 1


def test_random_repeats_with_its_seed():
    grid = cells(4, 5, 5)
    first, again, other = (
        keep(PruneConfig(keep_ratio=0.2, pruner="random", prune_seed=seed), grid).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(("window", "expected"), [("front", [0, 1]), ("middle", [4, 5]), ("back", [8, 9])])
def test_window(window, expected):
    config = PruneConfig(keep_tokens=2, pruner="window", window=window)
    assert keep(config, cells(10, 1, 1)).tolist() == expected


def test_frame_keeps_whole_evenly_spaced_steps():
    grid = cells(8, 3, 3)
    kept = grid[keep(PruneConfig(keep_tokens=18, pruner="frame"), grid)]
    assert kept[:, 0].unique(return_counts=True)[1].tolist() == [9, 9]
    assert kept[:, 0].unique().tolist() == [2, 6]


def test_budgets_of_several_visuals():
    grid = torch.cat([cells(4, 5, 5), cells(1, 5, 4)])
    visual_id = torch.tensor([0] * 100 + [1] * 20)
    scores = torch.cat([torch.ones(100), torch.zeros(20)])
    across = keep(PruneConfig(keep_ratio=0.1, pruner="attention"), grid, scores, visual_id)
    assert (across < 100).all()
    each = keep(PruneConfig(keep_ratio=0.1, pruner="attention", per_visual=True), grid, scores, visual_id)
    assert ((each < 100).sum().item(), (each >= 100).sum().item()) == (10, 2)
    frames = keep(PruneConfig(keep_tokens=25, pruner="frame"), grid, scores, visual_id)
    assert frames.shape[0] <= 25


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 50, 119, 120])
def test_shares_add_up_to_the_budget(budget):
    assert sum(prune.shares([100, 5, 15], budget)) == budget
    assert max(prune.shares([100, 5, 15], budget)) <= 100
    grid, visual_id = torch.cat([cells(4, 5, 5), cells(1, 5, 4)]), torch.tensor([0] * 100 + [1] * 20)
    assert len(keep(PruneConfig(keep_tokens=budget, per_visual=True), grid, torch.rand(120), visual_id)) == budget


def test_an_unknown_pruner_lists_the_known():
    with pytest.raises(ConfigError, match=r"'best'.*verifier"):
        keep(PruneConfig(pruner="best"), cells(1, 1, 4))


def test_a_pruner_of_ones_own_is_a_choice_by_itself():
    try:

        @prune.pruner("first", scored=False)
        def first(scores, grid, count, *, seed=0):
            return torch.arange(count) + seed

        assert keep(PruneConfig(pruner="first", keep_tokens=2, prune_seed=3), cells(1, 1, 9)).tolist() == [3, 4]
        assert not prune.needs_scores(PruneConfig(pruner="first"))
    finally:
        prune.PRUNERS.pop("first", None)


def test_nothing_to_prune():
    assert keep(PruneConfig(), cells(0, 1, 1)).tolist() == []


@pytest.mark.parametrize("name", sorted(prune.PRUNERS))
def test_a_hundred_thousand_tokens_take_no_more_operations_than_a_few(name):
    """Of torch, that is: nothing is done token by token."""

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.calls += 1
            return function(*arguments, **(options or {}))

    counts = []
    for times in (8, 256):
        grid = cells(times, 20, 20)
        scores, visual_id = torch.rand(len(grid)), torch.zeros(len(grid), dtype=torch.int64)
        with Counted() as counted:
            prune.select(scores, grid, visual_id, PruneConfig(pruner=name))
        counts.append(counted.calls)
    assert 0 < counts[1] <= 1.2 * counts[0] + 8
