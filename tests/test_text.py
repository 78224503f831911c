"""Streamed text: whole characters, stop strings, no end-of-sequence token."""

import pytest
import tiny

from specvlm.text import TextStream

TOKENIZER = tiny.tokenizer(tiny.QWEN_PLACEHOLDER)
EOS = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def stream(text, stop=(), end=(EOS,), size=1):
    """Chunks of a text that comes in rounds of `size` tokens."""
    ids = [*TOKENIZER.encode(text), *end]
    pieces = TextStream(TOKENIZER, {EOS}, stop)
    chunks = []
    for begin in range(0, len(ids), size):
        is_last = begin + size >= len(ids)
        chunks.append(pieces.add(ids[begin : begin + size], "stop" if is_last else None))
        if chunks[-1].finish_reason:
            break
    return chunks


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("text", ["The ball rolls.", "naïve 東京 🙂 fin", "one\ntwo\n\nthree\n", " lead", ""])
def test_pieces_are_the_text(text, size):
    chunks = stream(text, size=size)
    assert "".join(chunk.text for chunk in chunks) == text
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    assert sum(len(chunk.token_ids) for chunk in chunks) == len(TOKENIZER.encode(text)) + 1


def test_a_character_cut_off_at_the_end_is_shown_as_broken():
    ids = TOKENIZER.encode("東")[:-1]
    chunk = TextStream(TOKENIZER, {EOS}).add(ids, "length")
    assert "\ufffd" in chunk.text


@pytest.mark.parametrize("size", [1, 3, 20])
def test_nothing_of_a_stop_string_is_ever_shown(size):
    chunks = stream("red and blue, then green", stop=("blue", "and blu"), size=size)
    assert "".join(chunk.text for chunk in chunks) == "red "
    assert chunks[-1].finish_reason == "stop"
    shown = [token for chunk in chunks for token in chunk.token_ids]
    assert "and blu" in TOKENIZER.decode(shown)
    assert "and blu" not in TOKENIZER.decode(shown[:-1])


def test_a_stop_string_that_only_begins_is_shown_after_all():
    chunks = stream("red and bl", stop=("blue",))
    assert "".join(chunk.text for chunk in chunks) == "red and bl"
    assert chunks[-1].finish_reason == "stop"
