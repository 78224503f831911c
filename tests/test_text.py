"""Streamed text: whole characters, stop strings, no end-of-sequence token."""

import random

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from specvlm.engine.text import TextStream

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


def sentencepiece():
    """A Llama-like tokenizer: words that begin with a mark, bytes as tokens of their own, the first space stripped."""
    words = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "\n", "東", "▁東京"]
    vocab = {word: place for place, word in enumerate(["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    inner.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


TOKENIZERS = {"byte-level": TOKENIZER, "sentencepiece": sentencepiece()}


def random_ids(tokenizer, generator):
    """Ids of all kinds: any, bytes alone, specials, ids without a name, one id again and again, whole words."""
    size = len(tokenizer)
    kind = generator.randrange(6)
    length = generator.randrange(1, 60)
    if kind == 0:
        return [generator.randrange(size) for _ in range(length)]
    if kind == 1:
        return [generator.randrange(2, 258) for _ in range(length)]
    if kind == 2:
        return [generator.choice([*tokenizer.added_tokens_decoder, 5, size + 3]) for _ in range(length)]
    if kind == 3:
        return [generator.randrange(size)] * length
    return tokenizer.encode("".join(generator.choice("a b\n東京🙂é") for _ in range(length)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_ids_give_the_text_of_decode(name):
    tokenizer, generator = TOKENIZERS[name], random.Random(0)
    eos = tokenizer.eos_token_id
    for _ in range(600):
        ids = random_ids(tokenizer, generator)
        stop = generator.choice([(), ("never there",), ("\ufffe", "ab東京 never")])
        pieces, text, at = TextStream(tokenizer, {eos}, stop), "", 0
        while at < len(ids):
            size = generator.randrange(1, 9)
            part, at = ids[at : at + size], at + size
            text += pieces.add(part, "length" if at >= len(ids) else None).text
        kept = [token for token in ids if token != eos]
        assert text == tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False), ids


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("stop", [(), ("never there",)])
@pytest.mark.parametrize("text", ["a ball rolls to the left ", "東京🙂", "broken", "special"])
def test_a_token_costs_the_same_however_long_the_text_is(text, stop):
    broken = TOKENIZER.encode("🙂")[:1]
    ids = {"broken": broken, "special": [EOS - 1]}.get(text) or TOKENIZER.encode(text)
    tokenizer = Counting(TOKENIZER)
    pieces = TextStream(tokenizer, {EOS}, stop)
    for _ in range(3000 // len(ids)):
        for token in ids:
            pieces.add([token], None)
    assert tokenizer.decoded <= 60 * 3000
