"""How long rounds take: passes timed or guessed once, and corrected by every round that really runs.

A round's time is a sum of five parts, each a number of milliseconds times how often it comes: a plain step, a verified
row, a draft's first pass, its further passes, and its further rows. What a round really took moves the parts that it
holds, by as much as each is uncertain (a Kalman filter, 1960), so that an error of one part is not laid on all shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specvlm.core.tree import MAX_NODES, PLAIN, Shape, Tree

Array = NDArray[np.float64]

_FAR_ROWS, _FAR_WIDTH = 33, 9  # where the slopes of a table of rows are read
_LEAST_SLOPE = 0.01  # of a pass with one row, a row more: uncertain even where nothing was seen of it
_LEAST_HOST = 0.5  # of a plain step, what a round may take beside its passes: as uncertain as that
_UNSURE = {False: 0.25, True: 0.5}  # share by which a part that was timed, or only guessed, may be wrong
_TIMED_UNSURE = 0.02  # the same, of passes of captured graphs
_SHARED_UNSURE = 0.2  # the same, of all parts together: a machine that others use
_DRIFT, _SHARED_DRIFT = 0.02, 0.015  # a round
_NOISE = 0.12  # of what one round takes
_SURE_SHARE = 0.3  # of a plain step, by which it may be wrong and still counts as known
_LEAST_SEEN, _MOST_SEEN = 0.3, 2.0  # times what was expected: one round says no more than this
_LEAST_MS = 0.2  # of what the costs say: corrections make no round shorter than this

GUESSED_ROW = 0.06  # of a plain step, for each further row
_GUESSED_HOST = 0.1  # of a plain step, what a round costs besides passes


def _interpolate(points: Mapping[int, float], at: int) -> float:
    rows = sorted(points)
    if at <= rows[-1] or len(rows) == 1:
        return float(np.interp(at, rows, [points[row] for row in rows]))
    slope = (points[rows[-1]] - points[rows[-2]]) / (rows[-1] - rows[-2])
    return points[rows[-1]] + max(slope, 0.0) * (at - rows[-1])  # noise must not make a larger pass cheaper


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the passes of a pair at some length of context."""

    verify: Mapping[int, float]  # of a target pass, by its rows (nodes + 1); holds 1
    first: float  # of a draft round's first pass and all that a round costs besides passes
    level: Mapping[int, float]  # of every further draft pass, by its rows

    @staticmethod
    def guess(plain_ms: float, relative_size: float) -> Costs:
        """Return what passes may take where only a plain step is known: memory reads decide, rows cost little.

        Args:
            plain_ms: of a target pass of one row.
            relative_size: bytes of the draft's weights over those of the target's; 0 for a drafter without passes.
        """
        level = relative_size * plain_ms
        draft = {1: level, _FAR_WIDTH: level * (1 + GUESSED_ROW * (_FAR_WIDTH - 1))}
        verify = {1: plain_ms, _FAR_ROWS: plain_ms * (1 + GUESSED_ROW * (_FAR_ROWS - 1))}
        return Costs(verify, level + _GUESSED_HOST * plain_ms, draft)

    def verify_ms(self, rows: int) -> float:
        """Return the time of a target pass: linear between the measured rows, the last slope beyond them."""
        return _interpolate(self.verify, rows)

    def level_ms(self, rows: int) -> float:
        """Return the time of a draft pass after the first, read from `level` in the same way."""
        return _interpolate(self.level, rows)

    def round_ms(self, topology: Shape | Tree) -> float:
        """Return the time of a round that drafts this; without nodes it is a plain step."""
        if not len(topology):
            return self.verify_ms(1)
        return self.first + sum(map(self.level_ms, topology.passes[1:])) + self.verify_ms(len(topology) + 1)

    @property
    def parts(self) -> Array:
        """[5]: a plain step, a verified row more, a draft's first pass, a further one, a row more of it."""
        plain, level = self.verify_ms(1), self.level_ms(1)
        row = (self.verify_ms(_FAR_ROWS) - plain) / (_FAR_ROWS - 1)
        draft_row = (self.level_ms(_FAR_WIDTH) - level) / (_FAR_WIDTH - 1)
        return np.array([plain, row, self.first, level, draft_row])

    def moved(self, by: Array) -> Costs:
        """Return the costs with these milliseconds added to the parts; none falls below a share of what it was."""
        plain, row, first, level, draft_row = by

        def table(points: Mapping[int, float], one: float, more: float) -> dict[int, float]:
            return {at: max(ms + one + more * (at - 1), _LEAST_MS * ms) for at, ms in points.items()}

        verify = table(self.verify, plain, row)
        return Costs(verify, max(self.first + first, _LEAST_MS * self.first), table(self.level, level, draft_row))


def _features(topology: Shape | Tree) -> list[int]:
    """Return how often a round holds each part."""
    if not len(topology):
        return [1, 0, 0, 0, 0]
    passes = topology.passes
    return [1, len(topology), 1, len(passes) - 1, sum(passes) - len(passes)]


def _missed_features(missed: int) -> list[int]:
    """Return what a draft adds to a round that first runs tokens of the text which it has missed."""
    return [0, 0, 0, -(-missed // (MAX_NODES + 1)), missed]


class Pace:
    """What rounds take, by all that is known so far.

    Args:
        costs: timed, or guessed.
        is_guess: they are a guess: rounds move them further.
        is_scaled: their milliseconds are those of this machine; else the first plain step sets the scale.
        is_timed: passes of captured graphs were timed: rounds move all parts together, hardly one against the others.
    """

    def __init__(self, costs: Costs, *, is_guess: bool = False, is_scaled: bool = True, is_timed: bool = False) -> None:
        self.is_guess = is_guess
        self._is_timed = is_timed
        self.is_known = is_scaled  # whether anything was timed at all
        self.has_drafted = False  # whether a round that drafted was timed
        self._set(costs)

    def _set(self, costs: Costs) -> None:
        self._costs = costs
        size = np.abs(costs.parts)
        if not self._is_timed:
            size[1] = max(size[1], _LEAST_SLOPE * size[0])
            size[2] = max(size[2], _LEAST_HOST * size[0])
            size[4] = max(size[4], _LEAST_SLOPE * size[3])
        drift = 0.0 if self._is_timed else _DRIFT
        self._drift = np.diag((drift * size) ** 2) + np.outer(size, size) * _SHARED_DRIFT**2
        self._moved = np.zeros(len(size))
        self._parts = costs.parts
        self._known: dict[Shape | Tree, tuple[float, Array]] = {}  # of a round, what the costs say and what it holds
        self._plain_ms = self.round_ms(PLAIN)
        unsure = _TIMED_UNSURE if self._is_timed else _UNSURE[self.is_guess]
        self._covariance = np.diag((unsure * size) ** 2) + np.outer(size, size) * _SHARED_UNSURE**2
        self._most = np.sqrt(self._covariance.diagonal())

    def retime(self, costs: Costs) -> None:
        """Take passes that were timed in place of what was thought of them."""
        self.is_guess, self.is_known, self._is_timed = False, True, True
        self._set(costs)

    @property
    def plain_ms(self) -> float:
        """Milliseconds of a plain step."""
        return self._plain_ms

    @property
    def is_plain_sure(self) -> bool:
        """Whether plain steps ran lately, so that what they take is no guess."""
        return bool(self._covariance[0, 0] < (_SURE_SHARE * self._costs.verify_ms(1)) ** 2)

    def round_ms(self, topology: Shape | Tree, missed: int = 0) -> float:
        """Return the milliseconds of a round whose draft has first to run this many tokens that it missed."""
        base, features = self._round(topology)
        ms = max(base + float(features @ self._moved), _LEAST_MS * base)
        return ms + (self._late_ms(missed) if len(topology) else 0.0)

    def rounds_ms(self, rounds: Rounds, missed: int = 0) -> Array:
        """Return the milliseconds of each round."""
        base = rounds.base(self._costs)
        found: Array = np.maximum(base + rounds.features @ self._moved, _LEAST_MS * base)
        return found + self._late_ms(missed) * rounds.features[:, 2] if missed else found

    def _late_ms(self, missed: int) -> float:
        """Return what running so many missed tokens adds to a round that drafts."""
        if not missed:
            return 0.0
        late = np.array(_missed_features(missed), dtype=np.float64)
        return max(float(late @ (self._parts + self._moved)), 0.0)

    def _round(self, topology: Shape | Tree) -> tuple[float, Array]:
        """Return what the costs say of a round, and what it holds."""
        if topology not in self._known:
            self._known[topology] = self._costs.round_ms(topology), np.array(_features(topology), dtype=np.float64)
        return self._known[topology]

    def learn(self, topology: Shape | Tree, ms: float, missed: int = 0) -> None:
        """Take in what a round really took."""
        if not self.is_known:
            if len(topology):
                return
            scale = ms / self._costs.verify_ms(1)
            self.is_known = True
            self._set(self._costs.moved((scale - 1) * self._costs.parts))
        self.has_drafted |= len(topology) > 0
        _, features = self._round(topology)
        if len(topology):
            features = features + _missed_features(missed)
        expected = self.round_ms(topology, missed)
        seen = min(max(ms, _LEAST_SEEN * expected), _MOST_SEEN * expected)
        spread = self._covariance @ features
        gain = spread / (features @ spread + (_NOISE * expected) ** 2)
        self._moved += gain * (seen - expected)
        self._covariance += self._drift - np.outer(gain, spread)
        too_wide = np.minimum(1.0, self._most / np.sqrt(np.maximum(self._covariance.diagonal(), 1e-18)))
        self._covariance *= np.outer(too_wide, too_wide)
        self._plain_ms = self.round_ms(PLAIN)

    @property
    def costs(self) -> Costs:
        """The costs as corrected by now."""
        return self._costs.moved(self._moved)


class Rounds:
    """What many rounds hold, worked out once.

    Args:
        topologies: of each round.
    """

    def __init__(self, topologies: Sequence[Shape | Tree]) -> None:
        self._topologies = topologies
        features = [_features(topology) for topology in topologies]
        self.features = np.array(features, dtype=np.float64).reshape(len(topologies), 5)
        self._costs: Costs | None = None
        self._base = np.zeros(len(topologies))

    def base(self, costs: Costs) -> Array:
        """Return the milliseconds [rounds] that the costs alone say."""
        if costs is not self._costs:
            self._costs = costs
            self._base = np.array([costs.round_ms(topology) for topology in self._topologies])
        return self._base
