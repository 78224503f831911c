"""What is drafted, round by round, so that the expected tokens per second are highest. It decides speed, never text.

A round's worth is its expected tokens over its milliseconds. The tokens follow from how often the target took the
draft's first, second... candidate lately (`Acceptance`), the milliseconds from passes timed once (`Costs`). Plain
decoding is one of the choices: speculation switches itself off where it does not pay, and is probed again later.

Trees are grown by path probability as in EAGLE-2 (arXiv 2406.16858); the static tree is SpecVLM's (arXiv 2508.16201).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Protocol, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from specvlm.core import checks
from specvlm.core.tree import MAX_NODES, NUM_RANKS, PLAIN, Shape, Tree
from specvlm.speculate.pace import Pace, Rounds

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
_TOO_UNLIKELY = math.log(1000)
_KEPT_AT_CHANGE = 0.02  # of older evidence
_LOST_SHARE = 0.025  # of an answer's time so far that drafting may lose
_OPENING_SHARE = 0.01  # the same of the time that is still expected: what may be tried in the beginning
_TRIAL = 2.0  # plain steps that rounds may lose beside what beginning to draft has cost
_RISKS = 0.5, 1.0  # of what may still be lost, that one round may lose: the second where nothing else pays
_PROBE_SHARE = 0.015  # of the time of plain decoding that probes may lose
_RETRY_SHARE = 0.005  # of the time of all answers, that beginning again with a draft that did not pay may cost
_FIRST_TRUST, _MOST_TRUST = 1.0, 20.0  # plain steps that a draft is thought to have gained, at first and at most
_MOST_GAINED = 12.0  # plain steps gained that may be lost again
_PLAIN_STEPS = 7  # latest ones, whose median is what a plain step takes
_HOPED_SHARE = 0.4  # of a plain step that a draft which is trusted is hoped to save a token, at least
_PLAIN_SHARE = 0.002  # of the time of drafting rounds that looking at a plain step may take
_SHORTEST_INTERVAL = 4  # plain tokens between two probes, at least
_UNSURE_ROOM = 1.5  # times what could pay: what is left open where drafting was never timed
_LEAST_LOST = 0.1  # of a plain step: what looking at one costs, at least
_WAIT = 32  # tokens of an answer of unknown length that come plainly, where starting a draft takes time
_HARMLESS_SHARE = 0.02  # of the time so far: starting a draft for this much hurts no answer, however short


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
        usual = min(max(self._usual, 0.1), 0.9)  # so that three in a row never suffice
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
        self.depth = max((topology.depth for topology in candidates), default=0)
        self._count = len(candidates)
        self._shapes = [place for place, topology in enumerate(candidates) if isinstance(topology, Shape)]
        self._trees = [place for place, topology in enumerate(candidates) if isinstance(topology, Tree)]
        found = [topology for topology in candidates if isinstance(topology, Shape)]
        self._widths = sorted({shape.width for shape in found})
        self._most = max((shape.nodes for shape in found), default=0)
        self._cells = (
            [shape.depth - 1 for shape in found],
            [self._widths.index(shape.width) for shape in found],
            [shape.nodes - 1 for shape in found],
        )
        paths = [_steps(topology, self.depth) for topology in candidates if isinstance(topology, Tree)]
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


def _steps(topology: Tree, depth: int) -> NDArray[np.int64]:
    """Return [nodes, depth]: where the probabilities along each node's path stand in a flattened [depth, NUM_RANKS].

    Behind those stand a one, for what lies below the node, and a zero, for ranks that nobody counts.
    """
    one, zero = depth * NUM_RANKS, depth * NUM_RANKS + 1
    steps = np.full((len(topology), depth), one)
    for node, (parent, rank, at) in enumerate(zip(topology.parents, topology.ranks, topology.depths, strict=True)):
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

    topology: Shape | Tree  # PLAIN or an empty tree: nothing
    expected_tokens: float  # of the round, the bonus token included
    ms: float  # what the round should take; nan: not measured
    plain_ms: float  # what a plain step takes; nan: not measured
    is_probe: bool = False  # drafted only to learn whether it would pay
    best_ms: float | None = None  # beside a plain choice: what a token of the best tree would take; None: no tree fits
    probe_in: int | None = None  # beside a plain choice: plain tokens until the next probe; None: a tree would pay

    def explain(self) -> str:
        """Return the choice and its reason on one line, in plain words."""
        if not len(self.topology):
            return self._explain_plain()
        nodes = f"{len(self.topology)} node{'s' if len(self.topology) > 1 else ''}, depth {self.topology.depth}"
        if math.isnan(self.ms):
            return f"{nodes}: fixed, {self.expected_tokens:.1f} tokens"
        rate = f"{self.ms / self.expected_tokens:.1f} ms a token (plain {self.plain_ms:.1f})"
        words = f"{nodes}: {self.expected_tokens:.1f} tokens in {self.ms:.1f} ms, {rate}"
        return f"probe: {words}" if self.is_probe else words

    def _explain_plain(self) -> str:
        if self.best_ms is None:
            return "plain: no tree fits or could pay"
        words = f"the best tree would take {self.best_ms:.1f} ms a token (plain {self.plain_ms:.1f})"
        if self.probe_in is None:
            return f"plain for now: {words}"
        return f"plain: {words}; next probe in {self.probe_in} token{'' if self.probe_in == 1 else 's'}"


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
        topology: what every round drafts.
        acceptance: what is known so far.
    """

    def __init__(self, topology: Shape | Tree, acceptance: Acceptance | None = None) -> None:
        self.acceptance = Acceptance() if acceptance is None else acceptance
        self._drafted = topology
        self._expectation = _Expectation([topology] if len(topology) else [])

    def choose(self, left: int) -> Choice:
        """Return what every round drafts, or a plain step where nothing may be accepted."""
        if left <= 0 or not len(self._drafted):
            return Choice(PLAIN, 1.0, math.nan, math.nan)
        tokens = self._expectation.tokens(self.acceptance.by_depth(self._expectation.depth))
        return Choice(self._drafted, float(tokens[0]), math.nan, math.nan)

    def foresee(self) -> None:
        """Do nothing: there is nothing to choose."""

    def learn(
        self, choice: Choice, observations: Sequence[Observation], num_tokens: int, ms: float | None = None
    ) -> None:
        """Take in a round, for the account."""
        self.acceptance.learn(observations)


class Budget:
    """What drafting may lose against plain decoding in one answer, in milliseconds, whatever went wrong.

    Lost is what rounds that drafted took, and beginning to, less what plain steps would have taken for their tokens. It
    is worked out anew from every plain step that is seen, so that no wrong time of a pass can hide it.

    Args:
        spent_ms: of the request before its first token.
        plain_ms: of a plain step, by what is known before; None where nothing is.
    """

    def __init__(self, spent_ms: float, plain_ms: float | None) -> None:
        self.spent_ms = spent_ms  # as plain decoding would have taken
        self._plain = deque([] if plain_ms is None else [plain_ms], maxlen=_PLAIN_STEPS)
        self._plain_ms = plain_ms or 0.0
        self._drafted_ms = 0.0
        self._drafted_tokens = 0
        self._begun_ms = 0.0  # what beginning to draft has cost

    @property
    def lost_ms(self) -> float:
        """What drafting lost; below 0 where it gained."""
        return self._begun_ms + self._drafted_ms - self._drafted_tokens * self._plain_ms

    def room(self, remaining: float, begin_ms: float = 0.0) -> float:
        """Return what may still be lost.

        Args:
            remaining: tokens still expected.
            begin_ms: what is paid at once to begin to draft, on the hope that it pays.
        """
        share = _LOST_SHARE * self.spent_ms + _OPENING_SHARE * remaining * self._plain_ms
        begun_ms = self._begun_ms + begin_ms
        trial = begun_ms + _TRIAL * self._plain_ms if begun_ms else 0.0
        return max(share, trial) - self.lost_ms - begin_ms

    def begin(self, ms: float) -> None:
        """Note what beginning to draft costs."""
        self._begun_ms += ms

    def add_plain(self, tokens: int, ms: float | None) -> None:
        """Take in a plain step; None is a time that says nothing."""
        if ms is not None:
            self._plain.append(ms)
            self._plain_ms = median_low(self._plain)  # of two, that by which drafting gains less
        self.spent_ms += tokens * self._plain_ms

    def add_drafted(self, tokens: int, ms: float) -> None:
        """Take in a round that drafted."""
        self._drafted_ms += ms
        self._drafted_tokens += tokens
        self.spent_ms += tokens * self._plain_ms
        self._drafted_ms -= min(self.lost_ms + _MOST_GAINED * self._plain_ms, 0.0)


class Credit:
    """Whether a draft is begun with at all: what it gained over the last answers, and what trying it again may cost."""

    def __init__(self) -> None:
        self.gained = _FIRST_TRUST  # plain steps over the last answers
        self.saved_ms = 0.0  # a share of the time of all answers, for beginning again where the draft did not pay

    @property
    def is_trusted(self) -> bool:
        """Whether the draft is thought to pay; at first it is."""
        return self.gained > 0

    def add(self, ms: float, gained: float) -> None:
        """Take in time that an answer took, and the plain steps that it gained meanwhile."""
        self.saved_ms += _RETRY_SHARE * ms
        self.gained = min(max(self.gained + gained, -_MOST_TRUST), _MOST_TRUST)

    def spend(self) -> None:
        """Note that drafting has begun: the next time is saved for from now on."""
        self.saved_ms = 0.0


@dataclass(frozen=True)
class Start:
    """What it takes to begin to draft, and how much of the answer it has to be earned back by."""

    ms: float  # reading the prompt on the draft
    spent_ms: float  # of the request before its first token
    remaining: Callable[[int, int], float]  # (tokens so far, the most that may follow) -> tokens expected to follow
    are_longer: Callable[[float], bool]  # whether answers to such prompts were longer than so many tokens
    catches_up: bool = True  # whether the draft has to run what was decoded without it


NO_START = Start(0.0, 0.0, lambda done, left: left, lambda tokens: True, catches_up=False)


class Auto:
    """The candidate of the most expected tokens a millisecond, or a plain step where none beats it.

    While plain steps win, a probe comes now and then: the best of the shallowest candidates, and again at once as long
    as probes hit. What it takes to begin to draft is part of the first round's cost: see `Start`. No round is drafted
    that could lose more than the `Budget` has, even if none of its drafted tokens stood: so the loss is bounded.

    Args:
        pace: what rounds take.
        candidates: what may be drafted; what could not pay even if every token were accepted is never chosen.
        acceptance: what is known so far.
        credit: what beginning again may cost.
        start: what beginning takes.
    """

    def __init__(
        self,
        pace: Pace,
        candidates: Sequence[Shape | Tree],
        acceptance: Acceptance | None = None,
        credit: Credit | None = None,
        start: Start = NO_START,
    ) -> None:
        self.acceptance = Acceptance() if acceptance is None else acceptance
        self.credit = Credit() if credit is None else credit
        self.credit.add(start.spent_ms, 0.0)
        self.pace = pace
        self.budget = Budget(start.spent_ms, pace.plain_ms if pace.is_known else None)
        self._start, self._start_ms = start, start.ms
        self._candidates = [candidate for candidate in candidates if len(candidate)]
        self._depths = np.array([topology.depth for topology in self._candidates], dtype=np.int64)
        self._rounds = Rounds(self._candidates)
        self._expectation = _Expectation(self._candidates)
        self._ms: Array | None = None  # of the candidates, by the pace as it is now; None: not worked out yet
        self._heard: list[tuple[Shape | Tree, float, int]] = []  # rounds that the pace has not learnt from yet
        self._version = -2  # of the acceptance that _tokens were computed from
        self._tokens = np.ones(len(self._candidates))
        self._num_tokens = 1  # of the text; the prefill gave one
        self._missed = 1  # tokens of the text that a draft has not seen
        self._num_plain = math.inf  # plain tokens since something was drafted: at first nothing was missed, so try then
        self._since_plain = 0.0  # milliseconds of drafting rounds since a plain step
        self._is_warm = False  # the last round was a probe that hit

    def started(self) -> None:
        """Note that drafting has begun, so that nothing more has to be paid for it."""
        if self._start_ms:
            self.budget.begin(self._start_ms)
            self.credit.add(0.0, -self._start_ms / self.pace.plain_ms)
            self.credit.spend()
        self._start_ms = 0.0

    def choose(self, left: int) -> Choice:
        """Return what the next round drafts; what lies deeper than `left` is worthless and no candidate."""
        plain_ms = self.pace.plain_ms
        plain = Choice(PLAIN, 1.0, plain_ms, plain_ms)
        if not (self.pace.is_known and len(self._candidates)):
            return plain
        ms = self._rounds_ms()
        open_ms = _UNSURE_ROOM if self.pace.is_guess and not self.pace.has_drafted else 1.0
        fits = (self._depths <= left) & (ms < (self._depths + 1) * plain_ms * open_ms)
        if not fits.any():
            return plain
        rates = np.where(fits, self._expected() / ms, 0.0)
        best = float(rates.max())
        plain = replace(plain, best_ms=1 / best)
        is_hoped = self.credit.is_trusted if self._start_ms else not self._is_tried
        if not is_hoped and (self._start_ms or best * plain_ms <= 1):
            return self._probe_or(plain, rates, ms, left)
        if self._looks_at_plain(best) or not self._is_worth_starting(best, left):
            return plain
        room = self.budget.room(self._remaining(left), self._start_ms)
        for risk in _RISKS:
            safe = np.where(ms - plain_ms <= risk * room, rates, 0.0)  # even if no drafted token stood
            if safe.max() * plain_ms > 1:
                return self._choice(int(safe.argmax()), ms)
        probe = self._shallowest(safe)
        return self._choice(probe, ms, is_probe=True) if is_hoped and safe[probe] else plain

    def _probe_or(self, plain: Choice, rates: Array, ms: Array, left: int) -> Choice:
        """Return a probe where one is due, else the plain step with the time to the next."""
        probe = self._shallowest(rates)
        wait = self._wait(float(ms[probe]), left) if self.pace.is_plain_sure else 1
        return self._choice(probe, ms, is_probe=True) if wait <= 0 else replace(plain, probe_in=wait)

    def _shallowest(self, rates: Array) -> int:
        """Return the best of the shallowest candidates that have a rate."""
        depth = self._depths[rates > 0].min(initial=MAX_NODES)
        return int(np.where(self._depths == depth, rates, 0.0).argmax())

    def _remaining(self, left: int) -> float:
        return self._start.remaining(self._num_tokens, left + 1)

    def _choice(self, place: int, ms: Array, is_probe: bool = False) -> Choice:
        tokens = float(self._expected()[place])
        return Choice(self._candidates[place], tokens, float(ms[place]), self.pace.plain_ms, is_probe)

    def _is_worth_starting(self, rate: float, left: int) -> bool:
        """Whether what is still expected of the text earns back what it takes to begin to draft.

        Of a text whose length is unknown the first tokens come plainly: then a short one has lost nothing. At once it
        begins where answers to such prompts were at least twice as long as needed.
        """
        if self._start_ms == 0:
            return True
        saved = max(self.pace.plain_ms - 1 / rate, _HOPED_SHARE * self.pace.plain_ms)  # milliseconds a token
        done, start_ms = self._num_tokens, self._start_ms
        if self._remaining(left) * saved < start_ms:
            return False
        if start_ms <= _HARMLESS_SHARE * self.budget.spent_ms or self._start.are_longer(done + 2 * start_ms / saved):
            return True
        return done >= _WAIT

    def _looks_at_plain(self, rate: float) -> bool:
        """Whether a plain step is due, so that drafting is never compared with what a plain step once took."""
        lost = max(self.pace.plain_ms - 1 / rate, _LEAST_LOST * self.pace.plain_ms)
        return not self.pace.is_plain_sure or self._since_plain * _PLAIN_SHARE > lost

    def _wait(self, probe_ms: float, left: int) -> int:
        """Return the plain tokens before a probe, which may take its share of the time, and what there is room for."""
        plain_ms = self.pace.plain_ms
        cost = max(probe_ms - plain_ms, 0.0) + self._start_ms
        is_saved = self._start_ms > 0 and self.credit.saved_ms >= cost
        room = math.inf if is_saved else self.budget.room(self._remaining(left))
        for_room = (cost - room) / (_LOST_SHARE * plain_ms)
        share = _PROBE_SHARE * plain_ms
        for_turn = 0.0 if self._is_warm else max(float(_SHORTEST_INTERVAL), cost / share) - self._num_plain
        return math.ceil(max(for_room, for_turn, 0.0))

    def foresee(self) -> None:
        """Work out what all candidates are worth and take, by the evidence so far."""
        self._learn_pace()
        self._ms = self.pace.rounds_ms(self._rounds)
        if self._version != self.acceptance.version:
            self._tokens = self._expectation.tokens(self.acceptance.by_depth(self._expectation.depth))
            self._version = self.acceptance.version

    def learn(
        self, choice: Choice, observations: Sequence[Observation], num_tokens: int, ms: float | None = None
    ) -> None:
        """Take in a round: see `Policy`."""
        topology = choice.topology
        expected_ms = self.pace.round_ms(topology, self._late)
        self.acceptance.learn(observations)
        if ms is not None:
            self._heard.append((topology, ms, self._late))
            if not len(topology) or len(self._heard) > 1:
                self._learn_pace()
        took_ms = expected_ms if ms is None or not self.pace.is_known else ms
        is_idle = not len(topology) or (ms is None and not observations)  # there may have been nothing to propose
        if is_idle:
            self.budget.add_plain(num_tokens, None if len(topology) else ms)
        else:
            self.budget.add_drafted(num_tokens, took_ms)
        self.credit.add(took_ms, 0.0 if is_idle else num_tokens - took_ms / self.pace.plain_ms)
        self._num_tokens += num_tokens
        self._num_plain = self._num_plain + num_tokens if is_idle else 0
        self._missed = self._missed + num_tokens if not len(topology) else 0
        self._since_plain = 0.0 if is_idle else self._since_plain + took_ms
        self._is_warm = choice.is_probe and any(seen.hit is not None for seen in observations)

    def _learn_pace(self) -> None:
        """Take in what rounds took: while a GPU is busy where that can wait, for it takes longer than a choice."""
        for topology, ms, late in self._heard:
            self.pace.learn(topology, ms, late)
            self._ms = None
        self._heard.clear()

    def _rounds_ms(self) -> Array:
        """Return the milliseconds [candidates] of a round that comes next."""
        if self._late or self._ms is None:
            return self.pace.rounds_ms(self._rounds, self._late)
        return self._ms

    @property
    def _is_tried(self) -> bool:
        """Whether anything is known of the draft; else it is tried at once."""
        return self.acceptance.version > 0

    @property
    def _late(self) -> int:
        """Tokens that the draft has to run before the next round's own."""
        return max(self._missed - 1, 0) if self._start.catches_up else 0

    def _expected(self) -> Array:
        """Return the expected tokens of all candidates. The evidence of the latest round may be missing."""
        if self._version < self.acceptance.version - 1:
            self.foresee()
        return self._tokens


# What may be drafted, and what is known of acceptance -> the policy of one request.
MakePolicy = Callable[[Sequence[Shape | Tree], Acceptance], Policy]

# Of a program's own; auto and fixed are made where what they need is known.
POLICIES: dict[str, MakePolicy] = {}

M = TypeVar("M", bound=MakePolicy)


def policy(name: str) -> Callable[[M], M]:
    """Register a Policy class, or a function that makes one, under its name.

    It is called once a request with the trees that the drafter offers and the running acceptance.
    """

    def add(make: M) -> M:
        POLICIES[name] = make
        return make

    return add


def check(name: str) -> None:
    """Refuse a policy that does not exist.

    Raises:
        ConfigError: so it is; the known ones are listed.
    """
    checks.known("policy", name, checks.policies())
