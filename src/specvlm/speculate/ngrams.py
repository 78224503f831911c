"""Prompt lookup: what followed the last few tokens when they stood in the text before (PLD; LLMA, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from specvlm.families import Prompt

LONGEST = 3  # tokens that must match, at first
SHORTEST = 2


class Lookup:
    """The n-grams of a growing text.

    Args:
        excluded: ids that are no words, such as the placeholders of visual tokens: no match reaches over them.
    """

    def __init__(self, excluded: Iterable[int] = ()) -> None:
        self._excluded = frozenset(excluded)
        self._ids: list[int] = []
        self._run = 0  # words since the last excluded id
        self._ends: dict[tuple[int, ...], tuple[int, int]] = {}  # n-gram -> where it ended last, and the time before

    def extend(self, ids: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in ids:
            self._ids.append(token)
            self._run = 0 if token in self._excluded else self._run + 1
            end = len(self._ids)
            for length in range(SHORTEST, min(LONGEST, self._run) + 1):
                key = tuple(self._ids[end - length :])
                self._ends[key] = (end, self._ends.get(key, (0, 0))[0])

    def find(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that followed the text's last tokens before; the longest and latest match counts.

        A match that ends shortly before the text does repeats itself, so that a loop is continued in full.
        """
        for length in range(min(LONGEST, self._run), SHORTEST - 1, -1):
            _, before = self._ends.get(tuple(self._ids[len(self._ids) - length :]), (0, 0))
            if before:
                return self._after(before, limit)
        return []

    def _after(self, begin: int, limit: int) -> list[int]:
        found: list[int] = []
        period = len(self._ids) - begin
        for place in range(limit):
            token = self._ids[begin + place % period]
            if token in self._excluded:
                break
            found.append(token)
        return found


def words_of(prompt: Prompt, text: Sequence[int]) -> Lookup:
    """Return the index of the words of a prompt and of a text, over whose visual tokens no match reaches."""
    words = Lookup(set(prompt.input_ids[prompt.visual_index].tolist()))
    words.extend(prompt.input_ids.tolist())
    words.extend(text)
    return words
