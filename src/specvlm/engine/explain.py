"""What was drafted and why, for people: one line a stretch of rounds that drafted alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from specvlm.engine.account import Decision


def explain(decisions: Sequence[Decision]) -> str:
    """Return a line for every stretch of target passes with the same choice: when, what, why, and what came of it."""
    if not decisions:
        return "nothing was drafted: the text ended with its first token"
    lines, begin = [], 1
    for _, group in groupby(decisions, key=_kind):
        stretch = list(group)
        end = begin + len(stretch) - 1
        tokens = sum(decision.num_tokens for decision in stretch) / len(stretch)
        when = f"pass {begin}" if begin == end else f"passes {begin}-{end}"
        first = stretch[0]
        came = f"; came: {tokens:.1f}" if first.num_drafted else ""
        is_idle = len(first.choice.topology) > 0 == first.num_drafted
        lines.append(
            f"{when}: {'plain: the drafter had nothing to propose' if is_idle else first.choice.explain()}{came}"
        )
        begin = end + 1
    return "\n".join(lines)


def _kind(decision: Decision) -> object:
    """Return what rounds of one stretch share."""
    return decision.choice.topology, decision.choice.is_probe, decision.num_drafted > 0
