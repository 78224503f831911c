"""What a loaded pair has learnt and hands to its next requests: times, acceptance, credit, lengths.

A request works on a copy and hands it back at its end, so that any number of threads may ask one pair. What has not
been used for long is forgotten.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from specvlm.speculate.lengths import Lengths
from specvlm.speculate.pace import Costs
from specvlm.speculate.policy import Acceptance, Credit

T = TypeVar("T")
_MOST = 64  # entries of each kind
_MOST_LONGER = 2.0  # times what starting was thought to take: one start says no more than this
_NEWEST_SHARE = 0.3  # of the latest start in what starting is thought to take


class Recent(Generic[T]):
    """Values by key, those used last; each is handed out and taken back as a copy."""

    def __init__(self, most: int = _MOST) -> None:
        self._values: dict[Hashable, T] = {}
        self._most = most
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return a copy of the value of a key, or a new one where there is none."""
        with self._lock:
            found = self._values.pop(key, None)
            if found is None:
                return make()
            self._values[key] = found  # the last used stands last
            return copy.deepcopy(found)

    def put(self, key: Hashable, value: T) -> None:
        """Keep a copy of a value in place of the one there was."""
        kept = copy.deepcopy(value)
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = kept
            if len(self._values) > self._most:
                del self._values[next(iter(self._values))]

    def nearest(self, kind: Hashable, size: int) -> T | None:
        """Return a copy of the value under (kind, size), or else of that whose size is nearest; None without any."""
        with self._lock:
            sizes = [key[1] for key in self._values if isinstance(key, tuple) and key[0] == kind]
            if not sizes:
                return None
            return copy.deepcopy(self._values[kind, min(sizes, key=lambda other: abs(other - size))])


class StepTimes:
    """What passes take, by what decides it: who runs, how, and the length of its context (a power of two).

    Temperature, seed and keep_ratio do not: a pass computes the same under all of them, and what little they change is
    learnt from the rounds. Times of a length that never was are those of the nearest one.
    """

    def __init__(self) -> None:
        self._target: Recent[dict[int, float]] = Recent()
        self._draft: Recent[tuple[float, dict[int, float]]] = Recent()

    def get(self, target: tuple[Hashable, int], draft: tuple[Hashable, int]) -> Costs | None:
        """Return the costs of (kind, length) of a target and of a draft, None where one of them is not known."""
        verify = self._target.nearest(target[0], target[1].bit_length())
        drafting = self._draft.nearest(draft[0], draft[1].bit_length())
        if verify is None or drafting is None:
            return None
        return Costs(verify, *drafting)

    def put(self, target: tuple[Hashable, int], draft: tuple[Hashable, int], costs: Costs) -> None:
        """Keep costs, whose target passes and draft passes may be asked for apart."""
        self._target.put((target[0], target[1].bit_length()), dict(costs.verify))
        self._draft.put((draft[0], draft[1].bit_length()), (costs.first, dict(costs.level)))

    def __len__(self) -> int:
        return len(self._target) + len(self._draft)


class Memory:
    """All that a pair has learnt."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self.acceptance: Recent[Acceptance] = Recent()
        self.credit: Recent[Credit] = Recent()
        self.lengths = Lengths()
        self._starts: dict[Hashable, float] = {}  # of each kind of drafter, over the target's time for the same prompt
        self._lock = threading.Lock()

    def start_share(self, kind: Hashable, otherwise: float) -> float:
        """Return what starting such a draft takes, over the target's encoding and prefill of the same prompt."""
        with self._lock:
            return self._starts.get(kind, otherwise)

    def add_start(self, kind: Hashable, share: float, otherwise: float) -> None:
        """Note what starting a draft took, which is thought to take `otherwise` where nothing is known.

        The first start of a process compiles kernels: one that took far longer says little about the next.
        """
        with self._lock:
            known = self._starts.get(kind, otherwise)
            self._starts[kind] = known + (min(share, _MOST_LONGER * known) - known) * _NEWEST_SHARE
