"""A stand-in for the checkpoint's tokenizer and processor files, which cannot be downloaded everywhere.

The vocabulary has the published size and special ids. Every ordinary token is a made-up word, except for the 256 bytes,
of which all text is made; they stand at the start of the planted cycle, so that a prompt ends on a token whose
successor is planted.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specvlm_bench.published import Spec

_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% for part in message['content'] -%}
{{ part['text'] if part['type'] == 'text' else VIDEO }}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def tokenizer(spec: Spec) -> Any:
    """Return the tokenizer of a planted model; target and draft of a family share one."""
    return _tokenizer(spec.first_special, spec.specials, spec.cycle[0], spec.placeholder, spec.eos)


@cache
def _tokenizer(first_special: int, specials: tuple[str, ...], first_byte: int, placeholder: str, eos: str) -> Any:
    words = {f"<w{index}>": index for index in range(first_special)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for place, letter in enumerate(alphabet):
        del words[f"<w{first_byte + place}>"]
        words[letter] = first_byte + place
    words |= {token: first_special + place for place, token in enumerate(specials)}
    bpe = Tokenizer(models.BPE(vocab=words, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    template = _TEMPLATE.replace("VIDEO", json.dumps(placeholder))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token=eos, pad_token="<|endoftext|>", chat_template=template
    )
