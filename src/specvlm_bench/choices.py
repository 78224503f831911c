"""What a policy chose, over whole texts: which shapes most, and how soon it followed a change of the draft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from specvlm.engine.account import Decision

_MOST_SHAPES = 3


@dataclass(frozen=True)
class Chosen:
    """A shape, and the share of the target passes after the prefill that verified it."""

    nodes: int
    depth: int
    share: float


@dataclass(frozen=True)
class Change:
    """A place in a text where the draft turns good or hopeless, and when the policy had followed.

    It follows a turn to hopeless with a plain pass or a probe, a turn to good with a tree of depth 2 at least.
    """

    to_good: bool
    token: int  # of the text, the first after which the draft is another one
    rounds: int | None  # verified before the policy followed; None: it did not before the next change or the end


def shapes(decisions: Sequence[Decision]) -> list[Chosen]:
    """Return the shapes chosen most, plain passes (0 nodes) left out."""
    topology = (decision.choice.topology for decision in decisions)
    counts = Counter((len(shape), shape.depth) for shape in topology if len(shape))
    return [Chosen(*shape, count / len(decisions)) for shape, count in counts.most_common(_MOST_SHAPES)]


def changes(is_good: Sequence[bool], decisions: Sequence[Decision]) -> list[Change]:
    """Return what came of every change of the draft's quality.

    Args:
        is_good: of every token of a text, whether the draft is good about what follows it.
        decisions: of that text, one a target pass after the first token.
    """
    roots = [0]  # the token of the text that each pass starts from
    for decision in decisions[:-1]:
        roots.append(roots[-1] + decision.num_tokens)
    good = [is_good[root] for root in roots]
    turns = [place for place in range(1, len(good)) if good[place] != good[place - 1]]
    found = []
    for begin, end in pairwise([*turns, len(good)]):
        rounds = _rounds_until_followed(decisions[begin:end], to_good=good[begin])
        found.append(Change(good[begin], roots[begin], rounds))
    return found


def _rounds_until_followed(decisions: Sequence[Decision], *, to_good: bool) -> int | None:
    rounds = 0
    for choice in (decision.choice for decision in decisions):
        is_idle = choice.is_probe or not len(choice.topology)
        if (not is_idle and choice.topology.depth >= 2) if to_good else is_idle:
            return rounds
        rounds += len(choice.topology) > 0
    return None
