"""What was drafted and why, for people: one line a stretch of rounds that drafted alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from specvlm.report import Decision


def explain(decisions: Sequence[Decision]) -> str:
    """Return a line for every stretch of target passes with the same choice: when, what, why, and what came of it."""
    if not decisions:
        return "nothing was drafted: the text ended with its first token"
    lines, begin = [], 1
    for _, group in groupby(decisions, key=lambda decision: (decision.choice.drafted, decision.choice.is_probe)):
        stretch = list(group)
        end = begin + len(stretch) - 1
        tokens = sum(decision.num_tokens for decision in stretch) / len(stretch)
        when = f"pass {begin}" if begin == end else f"passes {begin}-{end}"
        came = f"; came: {tokens:.1f}" if len(stretch[0].choice.drafted) else ""
        lines.append(f"{when}: {stretch[0].choice.explain()}{came}")
        begin = end + 1
    return "\n".join(lines)
