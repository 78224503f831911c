"""From token ids to streamed text: whole characters only, stop strings, end-of-sequence tokens left out of the text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

_BROKEN = "\ufffd"  # stands for bytes that are no character, or not yet
_CHARACTER = 4  # bytes, and so tokens, of the longest one
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte's token in SentencePiece's vocabularies


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer: the text that became certain, and the tokens of the round it came with."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # on the last chunk: "stop" or "length"


class TextStream:
    """Detokenises one answer as it grows, at a constant cost a token.

    Args:
        tokenizer: the Hugging Face tokenizer.
        eos_ids: ids that end the text and are no part of it.
        stop: strings that end the text; the text stops before the first of them.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self._words = _Detokenizer(tokenizer, eos_ids)
        self._stop = stop
        self._held = ""  # settled text that is not handed out: it may be the beginning of a stop string

    def add(self, token_ids: Sequence[int], finish_reason: str | None) -> Chunk:
        """Take one round's tokens; return the chunk to hand out.

        A stop string ends the text: the chunk then has finish_reason "stop", and its tokens reach up to the one that
        completed the string.
        """
        for count, token in enumerate(token_ids if self._stop else (), 1):
            self._held += self._words.add([token])
            text = self._held + self._words.open_text
            found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
            if found:
                return Chunk(text[: min(found)], tuple(token_ids[:count]), "stop")
        if not self._stop:
            self._held = self._words.add(token_ids)
        if finish_reason is not None:
            return Chunk(self._held + self._words.finish(), tuple(token_ids), finish_reason)
        end = self._certain(self._held)
        new, self._held = self._held[:end], self._held[end:]
        return Chunk(new, tuple(token_ids))

    def _certain(self, text: str) -> int:
        """Return how many characters are no beginning of a stop string."""
        end = len(text)
        for stop in self._stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return end


class _Detokenizer:
    """The text of a growing row of tokens, as `tokenizer.decode` gives it; each token is decoded a few times only.

    Text is settled from time to time. What follows is decoded behind the tokens settled last, since a token's text may
    depend on whether it is the first. tokenizers' DecodeStream does the same, but keeps what is broken for ever, raises
    where bytes that were good become bad, and does not hand out the rest at the end.

    Args:
        tokenizer: the Hugging Face tokenizer.
        eos_ids: ids that are no part of the text.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._silent = specials.union(eos_ids)
        self._before: list[int] = []  # tokens settled last
        self._skip = 0  # characters of their text
        self._open: list[int] = []  # tokens behind them, whose text may still change
        self.open_text = ""  # theirs, as it is now

    def add(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that no later one can change."""
        names = self._tokenizer.convert_ids_to_tokens(list(token_ids))
        kept = [
            (token, name) for token, name in zip(token_ids, names, strict=True) if name and token not in self._silent
        ]
        if not kept:
            return ""
        self._open += [token for token, _ in kept]
        if _BYTE.fullmatch(kept[-1][1]):  # a run of such bytes is read as a whole, and broken as a whole
            return ""
        self.open_text = self._decode(len(self._open))
        size = len(self._open)
        if self.open_text and not self.open_text.endswith(_BROKEN):
            return self._settle(size, self.open_text)
        for count in range(size - 1, max(size - _CHARACTER, 0), -1):  # whole words before a broken end
            text = self._decode(count)
            if text and not text.endswith(_BROKEN) and self.open_text.startswith(text):
                return self._settle(count, text)
        if size > 2 * _CHARACTER:  # broken for good, but for what the last tokens may be the beginning of
            text = self._decode(size - _CHARACTER)
            if text and self.open_text.startswith(text):
                return self._settle(size - _CHARACTER, text)
        return ""

    def finish(self) -> str:
        """Return the rest of the text, broken characters included."""
        return self._decode(len(self._open))

    def _settle(self, count: int, text: str) -> str:
        self._before, self._open = self._open[:count], self._open[count:]
        self._skip = len(self._read(self._before))
        self.open_text = self.open_text[len(text) :]
        return text

    def _decode(self, count: int) -> str:
        """Return the text of the first `count` open tokens."""
        return self._read(self._before + self._open[:count])[self._skip :]

    def _read(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return text
