"""From token ids to streamed text: whole characters only, stop strings, end-of-sequence tokens left out of the text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer: the text that became certain, and the tokens of the round it came with."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # on the last chunk: "stop" or "length"


class TextStream:
    """Detokenises one answer as it grows.

    Args:
        tokenizer: the Hugging Face tokenizer.
        eos_ids: ids that end the text and are no part of it.
        stop: strings that end the text; the text stops before the first of them.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._stop = stop
        self._ids: list[int] = []
        self._sent = 0  # characters handed out
        self._anchor = 0  # tokens before this one are decoded for good
        self._settled = ""  # their text

    def add(self, token_ids: Sequence[int], finish_reason: str | None) -> Chunk:
        """Take one round's tokens; return the chunk to hand out.

        A stop string ends the text: the chunk then has finish_reason "stop", and its tokens reach up to the one that
        completed the string.
        """
        if not self._stop:
            self._ids += token_ids
            return self._chunk(self._decode(), token_ids, finish_reason)
        for count, token in enumerate(token_ids, 1):
            self._ids.append(token)
            text = self._decode()
            found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
            if found:
                return self._chunk(text[: min(found)], token_ids[:count], "stop")
        return self._chunk(self._decode(), token_ids, finish_reason)

    def _chunk(self, text: str, token_ids: Sequence[int], finish_reason: str | None) -> Chunk:
        end = len(text) if finish_reason else self._certain(text)
        new, self._sent = text[self._sent : end], max(self._sent, end)
        return Chunk(new, tuple(token_ids), finish_reason)

    def _certain(self, text: str) -> int:
        """Return how many characters no later token can change: no broken character, no beginning of a stop string."""
        end = len(text)
        while end and text[end - 1] == "\ufffd":
            end -= 1
        for stop in self._stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return end

    def _decode(self) -> str:
        """Decode the whole answer. Text before the last line break is settled, so that long answers stay cheap."""
        ids = [token for token in self._ids[self._anchor :] if token not in self._eos_ids]
        tail = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text: str = self._settled + tail
        if tail.endswith("\n"):
            self._settled, self._anchor = text, len(self._ids)
        return text
