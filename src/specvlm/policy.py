"""What is drafted, round by round, so that the expected tokens per second are highest. It decides speed, never text.

A round's worth is its expected tokens over its milliseconds. The tokens follow from how often the target took the
draft's first, second... candidate lately (`Acceptance`), the milliseconds from passes timed once (`Costs`). Plain
decoding is one of the choices: speculation switches itself off where it does not pay, and is probed again later.

Trees are grown by path probability as in EAGLE-2 (arXiv 2406.16858); the static tree is SpecVLM's (arXiv 2508.16201).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from specvlm.config import shown
from specvlm.errors import ConfigError
from specvlm.tree import MAX_NODES, NUM_RANKS, PLAIN, Shape, Tree

Array = NDArray[np.float64]

WIDTHS = (1, 4, 8)
# Of the draft's probability of a candidate; its bin is the number of edges that it does not exceed, 0 the surest.
BIN_EDGES = (0.95, 0.8, 0.5, 0.25, 0.1, 0.03, 0.005)
NUM_BINS = len(BIN_EDGES) + 1
_BIN_PROBS = (0.98, 0.88, 0.65, 0.37, 0.17, 0.06, 0.015, 0.002)  # typical of each bin
_BIN_WEIGHT = 3.0  # observations that the draft's own word is worth
_BIN_KEPT = 1 - 1 / 30  # of older evidence, a round

_PRIOR = (0.6, 0.12, 0.05, 0.03)
_PRIOR_WEIGHT = 2.0  # observations that the prior is worth
_POOL_WEIGHT = 6.0  # observations that the mean over depths is worth at each depth
_KEPT = 0.85  # of older evidence, a round
_CHANGED = np.array([0.15, 0.8])  # share of rounds whose root's candidates hit where the draft fails or is good
_USUAL_SHARE = 0.05
_TOO_UNLIKELY = math.log(100)
_KEPT_AT_CHANGE = 0.02  # of older evidence
_PROBE_SHARE = 0.015  # of the time of plain decoding that probes may take
_TIME_SHARE = 0.1  # of the latest round in what rounds are thought to take
_LEAST_LONGER, _MOST_LONGER = 0.3, 3.0  # one round says no more than this
_SHORTEST_INTERVAL = 4  # plain tokens between two probes, at least


def shapes(max_depth: int, max_nodes: int, sizes: Sequence[int]) -> list[Shape]:
    """Return the shapes worth considering, at most about a hundred.

    A width is offered up to where a narrower one still has two candidates for every row it runs: its third and fourth
    choices are rarely right.

    Args:
        max_depth: passes of the draft, at most.
        max_nodes: nodes that the target verifies, at most.
        sizes: rows of a target pass that are worth offering (a root and its nodes), such as those that fill a tile.
    """
    found = []
    for nodes in sorted({size - 1 for size in sizes if 2 <= size <= max_nodes + 1}):
        for depth in range(1, min(max_depth, nodes) + 1):
            narrower = 0
            for width in WIDTHS:
                shape = Shape(depth, width, nodes)
                is_new = width == 1 or shape.passes != Shape(depth, narrower, nodes).passes
                if is_new and 2 * narrower * depth < nodes <= shape.num_candidates:
                    found.append(shape)
                narrower = width
    return found


def _interpolate(points: Mapping[int, float], at: int) -> float:
    rows = sorted(points)
    if at <= rows[-1] or len(rows) == 1:
        return float(np.interp(at, rows, [points[row] for row in rows]))
    slope = (points[rows[-1]] - points[rows[-2]]) / (rows[-1] - rows[-2])
    return points[rows[-1]] + max(slope, 0.0) * (at - rows[-1])  # noise must not make a larger pass cheaper


@dataclass(frozen=True)
class Costs:
    """Milliseconds, measured once per loaded pair and length of context."""

    verify: Mapping[int, float]  # of a target pass, by its rows (nodes + 1); holds 1
    first: float  # of a draft round's first pass and all that a round costs besides passes
    level: Mapping[int, float]  # of every further draft pass, by its rows

    def verify_ms(self, rows: int) -> float:
        """Return the time of a target pass: linear between the measured rows, the last slope beyond them."""
        return _interpolate(self.verify, rows)

    def level_ms(self, rows: int) -> float:
        """Return the time of a draft pass after the first, read from `level` in the same way."""
        return _interpolate(self.level, rows)

    def round_ms(self, drafted: Shape | Tree) -> float:
        """Return the time of a round that drafts this; without nodes it is a plain step."""
        if not len(drafted):
            return self.verify_ms(1)
        return self.first + sum(map(self.level_ms, drafted.passes[1:])) + self.verify_ms(len(drafted) + 1)


@dataclass(frozen=True)
class Observation:
    """What a verified round told about one drafted row whose token stands in the text."""

    depth: int  # of its candidates, from 1
    hit: int | None  # which of its candidates (0 = the draft's first choice) the target chose; None: none of them
    bins: tuple[int, ...] = ()  # confidence bin of each candidate offered; empty: NUM_RANKS were offered, bins unknown

    @property
    def num_offered(self) -> int:
        """Candidates that the target could choose, of those that count."""
        return min(len(self.bins), NUM_RANKS) or NUM_RANKS


def _counts(hit: int | None) -> TypeGuard[int]:
    """Whether the target chose a candidate of a rank that is kept."""
    return hit is not None and hit < NUM_RANKS


def _count(cells: Sequence[tuple[int, int]], like: Array) -> Array:
    """Return how often each cell of a table was met."""
    width = like.shape[1]
    places = np.array([row * width + column for row, column in cells], dtype=np.int64)
    return np.bincount(places, minlength=like.size).reshape(like.shape).astype(np.float64)


class Acceptance:
    """Running acceptance by depth and rank, and by rank and confidence.

    Evidence is a count of hits and of tries that shrinks whenever newer comes. A row of rounds that all surprise in the
    same way (the root's candidates hit, or miss) means that the text has changed: then older evidence shrinks at once.
    """

    def __init__(self) -> None:
        self.version = 0  # grows whenever the numbers change
        self._hits = np.zeros((MAX_NODES + 1, NUM_RANKS))  # row 0 pools all depths
        self._tries = np.zeros((MAX_NODES + 1, NUM_RANKS))
        self._hits[0], self._tries[0] = _PRIOR_WEIGHT * np.array(_PRIOR), _PRIOR_WEIGHT
        self._bin_hits = np.zeros((NUM_RANKS, NUM_BINS))
        self._bin_tries = np.zeros((NUM_RANKS, NUM_BINS))
        self._usual = sum(_PRIOR)  # share of rounds lately in which one of the root's candidates hit
        self._doubt = np.zeros(2)  # log of how much likelier each of _CHANGED makes the latest rounds than _usual does

    def learn(self, observations: Sequence[Observation]) -> None:
        """Take in one round; a round that observed nothing changes nothing."""
        if not observations:
            return
        self.version += 1
        self._watch(observations)
        tries = _count([(o.depth, rank) for o in observations for rank in range(o.num_offered)], self._tries)
        hits = _count([(o.depth, o.hit) for o in observations if _counts(o.hit)], self._hits)
        hits[0], tries[0] = hits.sum(0), tries.sum(0)
        kept = np.where(tries > 0, _KEPT, 1.0)
        self._hits, self._tries = self._hits * kept + hits, self._tries * kept + tries
        tries = _count([cell for o in observations for cell in enumerate(o.bins[:NUM_RANKS])], self._bin_tries)
        hits = _count([(o.hit, o.bins[o.hit]) for o in observations if _counts(o.hit) and o.bins], self._bin_hits)
        self._bin_hits, self._bin_tries = self._bin_hits * _BIN_KEPT + hits, self._bin_tries * _BIN_KEPT + tries

    def by_depth(self, depth: int) -> Array:
        """Return [depth, NUM_RANKS]: how likely the target chooses this rank where the parent stands."""
        pooled = self._hits[0] / self._tries[0]
        own = slice(1, depth + 1)
        probs: Array = (self._hits[own] + _POOL_WEIGHT * pooled) / (self._tries[own] + _POOL_WEIGHT)
        probs *= np.minimum(1.0, (1 - 1e-3) / probs.sum(1, keepdims=True))
        return probs

    def by_confidence(self) -> Array:
        """Return [NUM_RANKS, NUM_BINS]: the same, by the bin of the draft's own probability of the candidate."""
        probs: Array = (self._bin_hits + _BIN_WEIGHT * np.array(_BIN_PROBS)) / (self._bin_tries + _BIN_WEIGHT)
        return probs

    def log_worth(self) -> list[float]:
        """Return the log of `by_confidence`, flattened and below 0: what a path's likelihood sums up."""
        return np.log(np.clip(self.by_confidence(), 1e-6, 0.999)).ravel().tolist()

    def _watch(self, observations: Sequence[Observation]) -> None:
        """Forget almost all where the root's candidates hit or miss too unlike what is usual (Page's test, 1954)."""
        root = next((seen for seen in observations if seen.depth == 1), None)
        if root is None:
            return
        is_hit = root.hit is not None
        likelihood = _CHANGED if is_hit else 1 - _CHANGED
        usual = min(max(self._usual, 0.1), 0.9)  # so that two in a row never suffice
        self._doubt = np.maximum(0.0, self._doubt + np.log(likelihood / (usual if is_hit else 1 - usual)))
        self._usual += (is_hit - self._usual) * _USUAL_SHARE
        if self._doubt.max() > _TOO_UNLIKELY:
            self._usual = float(_CHANGED[self._doubt.argmax()])
            self._doubt[:] = 0.0
            self._hits *= _KEPT_AT_CHANGE
            self._tries *= _KEPT_AT_CHANGE
            self.version += 1  # what was foreseen before holds no more


class _Expectation:
    """The expected tokens of many candidates at once, the bonus token included."""

    def __init__(self, candidates: Sequence[Shape | Tree]) -> None:
        self.depth = max((drafted.depth for drafted in candidates), default=0)
        self._count = len(candidates)
        self._shapes = [place for place, drafted in enumerate(candidates) if isinstance(drafted, Shape)]
        self._trees = [place for place, drafted in enumerate(candidates) if isinstance(drafted, Tree)]
        found = [drafted for drafted in candidates if isinstance(drafted, Shape)]
        self._widths = sorted({shape.width for shape in found})
        self._most = max((shape.nodes for shape in found), default=0)
        self._cells = (
            [shape.depth - 1 for shape in found],
            [self._widths.index(shape.width) for shape in found],
            [shape.nodes - 1 for shape in found],
        )
        paths = [_steps(drafted, self.depth) for drafted in candidates if isinstance(drafted, Tree)]
        self._steps = np.concatenate(paths) if paths else np.zeros((0, self.depth), dtype=np.int64)
        self._begins = np.cumsum([0, *map(len, paths)])[:-1]

    def tokens(self, ranks: Array) -> Array:
        """Return [candidates] for the acceptance ranks [depth, NUM_RANKS]."""
        tokens = np.ones(self._count)
        if self._shapes:
            tokens[self._shapes] += _best_first(ranks, self._widths, self._most)[self._cells]
        if self._trees:
            probs = np.append(ranks.ravel(), (1.0, 0.0))[self._steps].prod(1)
            tokens[self._trees] += np.add.reduceat(probs, self._begins)
        return tokens


def _steps(drafted: Tree, depth: int) -> NDArray[np.int64]:
    """Return [nodes, depth]: where the probabilities along each node's path stand in a flattened [depth, NUM_RANKS].

    Behind those stand a one, for what lies below the node, and a zero, for ranks that nobody counts.
    """
    one, zero = depth * NUM_RANKS, depth * NUM_RANKS + 1
    steps = np.full((len(drafted), depth), one)
    for node, (parent, rank, at) in enumerate(zip(drafted.parents, drafted.ranks, drafted.depths, strict=True)):
        if parent >= 0:
            steps[node] = steps[parent]
        steps[node, at - 1] = (at - 1) * NUM_RANKS + rank if rank < NUM_RANKS else zero
    return steps


def _best_first(ranks: Array, widths: Sequence[int], most: int) -> Array:
    """Return [depth, widths, most]: accepted tokens expected of the 1, 2... best nodes down to a depth.

    The best nodes by path probability always form a tree, for a parent is at least as likely as its child.
    """
    widest = max(widths)
    runs = np.arange(widest)[::-1] < np.array(widths)[:, None]  # ascending order: the likeliest rows stand last
    rows = np.zeros((len(widths), widest))
    rows[:, -1] = 1.0  # the root
    best, levels = np.zeros((len(widths), most)), []
    for probs in ranks:
        grown = (rows[:, :, None] * probs).reshape(len(widths), -1)
        merged = np.concatenate([best, grown], 1)
        merged.sort(1)
        grown.sort(1)
        best, rows = merged[:, -most:], grown[:, -widest:] * runs
        levels.append(best)
    return np.cumsum(np.stack(levels)[:, :, ::-1], 2)


@dataclass(frozen=True)
class Choice:
    """What the next round drafts, and why."""

    drafted: Shape | Tree  # PLAIN or an empty tree: nothing
    expected_tokens: float  # of the round, the bonus token included
    ms: float  # what the round should take; nan: not measured
    plain_ms: float  # what a plain step takes; nan: not measured
    is_probe: bool = False  # drafted only to learn whether it would pay
    best_ms: float | None = None  # beside a plain choice: what a token of the best tree would take; None: no tree fits
    probe_in: int | None = None  # beside a plain choice: plain tokens until the next probe

    def explain(self) -> str:
        """Return the choice and its reason on one line, in plain words."""
        if not len(self.drafted):
            return self._explain_plain()
        nodes = f"{len(self.drafted)} node{'s' if len(self.drafted) > 1 else ''}, depth {self.drafted.depth}"
        if math.isnan(self.ms):
            return f"{nodes}: fixed, {self.expected_tokens:.1f} tokens"
        rate = f"{self.ms / self.expected_tokens:.1f} ms a token (plain {self.plain_ms:.1f})"
        words = f"{nodes}: {self.expected_tokens:.1f} tokens in {self.ms:.1f} ms, {rate}"
        return f"probe: {words}" if self.is_probe else words

    def _explain_plain(self) -> str:
        if self.best_ms is None:
            return "plain: no tree fits or could pay"
        words = f"plain: the best tree would take {self.best_ms:.1f} ms a token (plain {self.plain_ms:.1f})"
        return f"{words}; next probe in {self.probe_in} token{'' if self.probe_in == 1 else 's'}"


class Policy(Protocol):
    """Chooses what a round drafts and learns from what came of it."""

    acceptance: Acceptance

    def choose(self, left: int) -> Choice:
        """Return what the next round drafts, where `left` drafted tokens may still be accepted."""
        ...

    def foresee(self) -> None:
        """Do what the next choice needs and this round cannot change much, while a GPU is busy with the round."""
        ...

    def learn(
        self, choice: Choice, observations: Sequence[Observation], num_tokens: int, ms: float | None = None
    ) -> None:
        """Take in a round: what was chosen, what it showed, how many tokens it added to the text and how long it took.

        None is a time that says nothing, such as that of a round which was run for the first time.
        """
        ...


class Fixed:
    """Always the same Shape or Tree, however little may still be accepted; nothing where that is nothing.

    Args:
        drafted: what every round drafts.
        costs: read for the account alone; None leaves the times open.
        acceptance: what is known so far.
    """

    def __init__(self, drafted: Shape | Tree, costs: Costs | None = None, acceptance: Acceptance | None = None) -> None:
        self.acceptance = Acceptance() if acceptance is None else acceptance
        self._drafted = drafted
        self._expectation = _Expectation([drafted] if len(drafted) else [])
        self._ms = math.nan if costs is None else costs.round_ms(drafted)
        self._plain_ms = math.nan if costs is None else costs.round_ms(PLAIN)

    def choose(self, left: int) -> Choice:
        """Return what every round drafts, or a plain step where nothing may be accepted."""
        if left <= 0 or not len(self._drafted):
            return Choice(PLAIN, 1.0, self._plain_ms, self._plain_ms)
        tokens = self._expectation.tokens(self.acceptance.by_depth(self._expectation.depth))
        return Choice(self._drafted, float(tokens[0]), self._ms, self._plain_ms)

    def foresee(self) -> None:
        """Do nothing: there is nothing to choose."""

    def learn(
        self, choice: Choice, observations: Sequence[Observation], num_tokens: int, ms: float | None = None
    ) -> None:
        """Take in a round, for the account."""
        self.acceptance.learn(observations)


class Auto:
    """The candidate of the most expected tokens a millisecond, or a plain step where none beats it.

    While plain steps win, a probe comes now and then: the best of the shallowest candidates, so seldom that it costs
    1.5 % of the time; and again at once as long as probes hit.

    Args:
        costs: of this pair, at this length of context.
        candidates: what may be drafted; those that could not pay even if every token were accepted are left out.
        acceptance: what is known so far.
    """

    def __init__(self, costs: Costs, candidates: Sequence[Shape | Tree], acceptance: Acceptance | None = None) -> None:
        self.acceptance = Acceptance() if acceptance is None else acceptance
        self._costs = costs
        self._plain_ms = costs.round_ms(PLAIN)
        able = [c for c in candidates if len(c) and costs.round_ms(c) < (c.depth + 1) * self._plain_ms]
        self._candidates = able
        self._depths = np.array([drafted.depth for drafted in able], dtype=np.int64)
        self._ms = np.array([costs.round_ms(drafted) for drafted in able])
        self._expectation = _Expectation(able)
        self._is_shallowest = self._depths == self._depths.min(initial=MAX_NODES)
        self._version = -2  # of the acceptance that _tokens were computed from
        self._tokens = np.ones(len(able))
        self._longer = {True: 1.0, False: 1.0}  # time of late over what the costs say, of plain and of drafting rounds
        self._num_plain = 0  # plain tokens since something was drafted
        self._is_warm = False  # the last round was a probe that hit

    def choose(self, left: int) -> Choice:
        """Return what the next round drafts; what lies deeper than `left` is worthless and no candidate."""
        fits = self._depths <= left
        if not fits.any():
            return Choice(PLAIN, 1.0, self._plain_now, self._plain_now)
        rates = self._expected() / (self._ms * self._longer[False])
        best = int(np.where(fits, rates, 0.0).argmax())
        if rates[best] * self._plain_now > 1:
            return self._choice(best)
        probe = int(np.where(self._is_shallowest, rates, 0.0).argmax())
        wait = self._interval(probe) - self._num_plain
        is_unknown = self.acceptance.version == 0  # a draft of which nothing is known is probed at once
        if self._is_warm or is_unknown or wait <= 0:
            return self._choice(probe, is_probe=True)
        return Choice(PLAIN, 1.0, self._plain_now, self._plain_now, best_ms=1 / float(rates[best]), probe_in=wait)

    def foresee(self) -> None:
        """Work out what all candidates are worth, by the evidence so far."""
        if self._version != self.acceptance.version:
            self._tokens = self._expectation.tokens(self.acceptance.by_depth(self._expectation.depth))
            self._version = self.acceptance.version

    def learn(
        self, choice: Choice, observations: Sequence[Observation], num_tokens: int, ms: float | None = None
    ) -> None:
        """Take in a round: see `Policy`. Rounds that take longer than the costs say are expected to go on doing so."""
        self.acceptance.learn(observations)
        is_plain = not len(choice.drafted)
        if ms is not None:
            longer = min(max(ms / self._costs.round_ms(choice.drafted), _LEAST_LONGER), _MOST_LONGER)
            self._longer[is_plain] += (longer - self._longer[is_plain]) * _TIME_SHARE
        is_idle = is_plain or not observations  # a drafter may have had nothing to propose
        self._num_plain = self._num_plain + num_tokens if is_idle else 0
        self._is_warm = choice.is_probe and any(seen.hit is not None for seen in observations)

    def _expected(self) -> Array:
        """Return the expected tokens of all candidates. The evidence of the latest round may be missing."""
        if self._version < self.acceptance.version - 1:
            self.foresee()
        return self._tokens

    def _interval(self, probe: int) -> int:
        """Return the plain tokens before a probe that keep it within its share of the time."""
        extra = float(self._ms[probe]) - self._plain_ms
        return max(_SHORTEST_INTERVAL, math.ceil(extra / (_PROBE_SHARE * self._plain_ms)))

    def _choice(self, place: int, is_probe: bool = False) -> Choice:
        tokens, ms = float(self._expected()[place]), float(self._ms[place]) * self._longer[False]
        return Choice(self._candidates[place], tokens, ms, self._plain_now, is_probe)

    @property
    def _plain_now(self) -> float:
        return self._plain_ms * self._longer[True]


def check(name: str) -> None:
    """Refuse a policy that does not exist.

    Raises:
        ConfigError: the name is neither auto nor fixed.
    """
    if name not in ("auto", "fixed"):
        raise ConfigError(f"policy={shown(name)} is not allowed: auto or fixed")
