"""The acceptance sweep: what it counts and what it prints."""

import pytest

from specvlm.bench.acceptance import Method, Result, interval, methods, table


def result(clip, pruner, ratio, accepted, **changes):
    fields = {"tree": "paper", "visual_tokens": 100, "kept_visual_tokens": 10, "completion_tokens": 40, "rounds": 10}
    fields |= {"target_passes": 11, "is_plain": True, "is_generate": True} | changes
    return Result(clip=clip, pruner=pruner, keep_ratio=ratio, accepted_tokens=accepted, **fields)


def test_the_interval_is_students():
    # standard deviation 2.1602, over sqrt(4), times the 97.5 % quantile 3.1824 of 3 degrees of freedom
    mean, half = interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(3.4373, rel=2e-3)
    assert interval([5.0]) == (5.0, 0.0)


def test_unpruned_is_swept_once_a_tree():
    assert methods(["uniform", "none", "random"], [1.0, 0.1], ["paper"]) == [
        Method("none", 1.0, "paper"),
        Method("uniform", 0.1, "paper"),
        Method("random", 0.1, "paper"),
    ]


def test_the_table_pairs_by_clip_and_counts_what_differs():
    results = [
        *(result(clip, "none", 1.0, accepted) for clip, accepted in (("a", 40), ("b", 50))),
        *(result(clip, "verifier", 0.1, accepted) for clip, accepted in (("a", 38), ("b", 48))),
        *(result(clip, "random", 0.1, accepted) for clip, accepted in (("a", 28), ("b", 38))),
    ]
    results[-1] = result("b", "random", 0.1, 38, is_generate=False)
    text = table(results, "specvlm bench acceptance")
    assert "5 of 6 answers" in text
    assert "| verifier | 0.1 | 4.30 ± 6.36 | 96% |" in text  # half-width: t(1) = 12.71 times sqrt(0.5 / 2)
    assert "| 0.1 | **+1.00 ± 0.00** |" in text  # the same gap on every clip, however far apart the clips are
