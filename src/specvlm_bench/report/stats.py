"""Estimates with 95 % intervals, clustered by video.

Samples of one video resemble each other, so videos are drawn, not samples: a resample takes as many videos as there
are, with replacement, each with all its samples (the cluster bootstrap; Field and Welsh, "Bootstrapping clustered
data", J. R. Statist. Soc. B 69, 2007). The interval reaches from one percentile of the resampled statistic to another.
With few videos the 2.5th and the 97.5th are too near, so both move outwards by what Student's t and the n - 1 of the
variance would add (the expanded percentile interval; Hesterberg, "What Teachers Should Know About the Bootstrap", The
American Statistician 69, 2015). One video says nothing about others, so there is no interval then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

LEVEL = 0.95
RESAMPLES = 4000
RELIABLE = 5  # clusters; an interval over fewer holds the truth less often than it says: over 2 in half of all cases
_SEED = 0

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]  # [resamples, clusters]: how often each was drawn


@dataclass(frozen=True)
class Estimate:
    """A statistic of samples and its interval, whose ends are None where the samples are of one cluster."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Return the mean over samples, each of the cluster at its place; None of nothing."""
    return pooled(values, [1.0] * len(values), clusters)


def pooled(parts: Sequence[float], wholes: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Return the sum of the parts over the sum of the wholes; None where that is 0.

    Args:
        parts: of a sample each.
        wholes: the same; samples in which one is 0 do not count.
        clusters: the same.
    """
    used = [place for place, whole in enumerate(wholes) if whole]
    if not used:
        return None
    index, count = _index([clusters[place] for place in used])
    above = np.bincount(index, [parts[place] for place in used], count)
    below = np.bincount(index, [wholes[place] for place in used], count)
    return _estimate(float(above.sum() / below.sum()), count, lambda draws: (draws @ above) / (draws @ below))


def median(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Return the median over samples, each of the cluster at its place; None of nothing."""
    if not values:
        return None
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values, np.float64)[order]
    index, count = _index(clusters)

    def resampled(draws: Counts) -> Floats:
        upto = draws[:, index[order]].cumsum(1, dtype=np.int32)  # [resamples, samples]
        half = upto[:, -1:] / 2
        found: Floats = (ordered[(upto >= half).argmax(1)] + ordered[(upto > half).argmax(1)]) / 2
        return found

    return _estimate(float(np.median(ordered)), count, resampled)


def mean_difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Return the mean of second - first, paired by place."""
    return mean([after - before for before, after in zip(first, second, strict=True)], clusters)


def median_ratio(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Return the median of second / first, paired by place; no first may be 0."""
    return median([after / before for before, after in zip(first, second, strict=True)], clusters)


def _index(clusters: Sequence[Hashable]) -> tuple[npt.NDArray[np.intp], int]:
    """Return the number of each sample's cluster, from 0, and how many clusters there are."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.intp)
    return index, len(numbers)


def _estimate(value: float, count: int, resampled: Callable[[Counts], Floats]) -> Estimate:
    if count == 1:
        return Estimate(value)
    tail = _tail(count)
    low, high = np.quantile(resampled(_draws(count)), [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


@lru_cache(maxsize=16)
def _draws(count: int) -> Counts:
    """Return how often each of `count` clusters is in each resample; the same draws for all statistics of a size."""
    drawn = np.random.default_rng(_SEED).multinomial(count, [1 / count] * count, size=RESAMPLES)
    return drawn.astype(np.int32)


def _tail(count: int) -> float:
    """Return the share of the resampled statistic that an interval over `count` clusters leaves out on either side.

    It is as wide as one by Student's t, which the resampled statistic, being normal, would be too narrow for.
    """
    freedom = count - 1
    student = stdtrit(freedom, (1 + LEVEL) / 2)
    return float(ndtr(-math.sqrt(count / freedom) * student))
