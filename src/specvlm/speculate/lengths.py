"""How long answers get: what a draft's start has to be earned back by."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Hashable

_MOST_ANSWERS = 32  # remembered of one kind of prompt
_MOST_PROMPTS = 64  # kinds of prompts remembered


class Lengths:
    """Lengths of the answers so far, by kind of prompt. Threads may share it."""

    def __init__(self) -> None:
        self._all: deque[tuple[int, bool]] = deque(maxlen=_MOST_ANSWERS)
        self._by_prompt: dict[Hashable, deque[tuple[int, bool]]] = {}
        self._lock = threading.Lock()

    def add(self, prompt: Hashable, tokens: int, *, is_cut: bool) -> None:
        """Note an answer: its tokens, and whether it was cut off and might have gone on."""
        with self._lock:
            own = self._by_prompt.pop(prompt, None) or deque(maxlen=_MOST_ANSWERS)
            self._by_prompt[prompt] = own  # the latest stands last
            self._all.append((tokens, is_cut))
            own.append((tokens, is_cut))
            if len(self._by_prompt) > _MOST_PROMPTS:
                del self._by_prompt[next(iter(self._by_prompt))]

    def remaining(self, prompt: Hashable, done: int, left: int) -> float:
        """Return the tokens still expected of an answer that has `done` tokens, of which at most `left` may follow.

        Answers to such prompts count, else all; and one that may be of any length, each magnitude as likely.
        """
        with self._lock:
            known = list(self._by_prompt.get(prompt) or self._all)
        later = [min(_later(done, left, *answer), left) for answer in known if answer[0] > done]
        return (sum(later) + _any_length(done, left)) / (len(later) + 1)

    def are_longer(self, prompt: Hashable, tokens: float) -> bool:
        """Whether answers to such prompts were longer, and none ended before; what was cut before tells nothing."""
        with self._lock:
            known = list(self._by_prompt.get(prompt, ()))
        ended = [length > tokens for length, is_cut in known if length > tokens or not is_cut]
        return bool(ended) and all(ended)


def _later(done: int, left: int, length: int, is_cut: bool) -> float:
    """Return the tokens after `done` of an answer like one of this length, which may have been cut there."""
    more = length - done
    return more + _any_length(length, left - more) if is_cut else more


def _any_length(done: int, left: int) -> float:
    """Return the tokens expected where the length is log-uniform between what is done and the most."""
    if left <= 0:
        return 0.0
    done = max(done, 1)
    return left / math.log1p(left / done) - done
