"""Draft topologies."""

import pytest
import torch

from specvlm.core import tree
from specvlm.core.errors import ConfigError
from specvlm.core.rows import Rows, ancestors


def test_paper_tree_is_the_published_one():
    paper = tree.parse("paper")
    assert len(paper) == 25
    assert [paper.depths.count(depth) for depth in range(1, 6)] == [4, 8, 8, 3, 2]
    children = [sum(parent == node for parent in paper.parents) for node in range(-1, 25)]
    assert children[:5] == [4, 3, 2, 2, 1]  # of the root, then of its four children
    assert paper.ranks[-2:] == (0, 1)


def test_chain_is_a_tree_of_first_choices():
    assert tree.parse("chain:3") == tree.Tree((-1, 0, 1), (0, 0, 0))
    assert tree.parse("0,00,000") == tree.parse("chain:3")


def test_paths_may_come_in_any_order():
    assert tree.parse("00, 1, 0") == tree.Tree((-1, -1, 0), (0, 1, 0))
    assert tree.parse(("1", "0", "00")) == tree.parse("0,1,00")


def test_a_path_may_skip_siblings():
    assert tree.parse("2,20") == tree.Tree((-1, 0), (2, 0))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("oak", "oak"),
        ("", "paper, chain:N"),
        ("chain:", "chain:N"),
        ("chain:0", "1 to 127"),
        ("chain:200", "1 to 127"),
        ("0,0", "stands once"),
        ("0,x", "'x'"),
        ("0,10", "add '1'"),
        (tuple(str(i) * n for i in range(10) for n in range(1, 14)), "130 nodes"),
    ],
)
def test_a_bad_tree_is_named(spec, words):
    with pytest.raises(ConfigError, match=words):
        tree.parse(spec)


def test_ancestors_see_their_own_path_only():
    # the fault of the authors' code: siblings at one-node levels saw each other
    sees = ancestors((-1, -1, 0, 0, 2))
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert sees.sum(1).tolist() == [1, 1, 2, 2, 3]


def test_rows_are_the_last_of_their_tree():
    rows = Rows.of((-1, 0, 1, 1, 2), 2, torch.device("cpu"))
    assert rows.sees.int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
    assert rows.depths.tolist() == [3, 4]
    assert not rows.is_chain
    assert Rows.of((-1, 0, 1), 3, torch.device("cpu")).is_chain
    assert not Rows.of((-1, 0, 1), 2, torch.device("cpu")).is_chain
