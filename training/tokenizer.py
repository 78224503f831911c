"""The byte-level BPE of the bundled pair, with Qwen's special tokens and chat format.

python -m training.tokenizer OUT_DIR
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from training.language import PROMPTS, caption, questions
from training.world import sample_scene

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 1024

# A caption's words take most merges; these few keep other prompts from falling apart into bytes.
_PLAIN_ENGLISH = """system
user
assistant
You are a helpful assistant.
Can you tell me about the video, please? Who is in it, and why? Which one of them would you say was first or last?
Write a short summary of this clip in one sentence. Explain what we can see here, with as much detail as possible.
Answer with yes or no. I do not know. The image shows some people who have been there for a long time, but not now.
How much, how often, when and where did they go? Give only the number. What else could you say about all these things?
"""

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def corpus(num_scenes: int) -> list[str]:
    """Captions and answers of `num_scenes` scenes, the prompts, and a little plain English."""
    texts = [*PROMPTS, *([_PLAIN_ENGLISH] * 20)]
    for seed in range(num_scenes):
        scene = sample_scene((2, seed), 64)
        turns = questions(scene, np.random.default_rng(seed), 8)
        texts += [caption(scene), *(f"{turn.prompt} {turn.answer}" for turn in turns)]
    return texts


def build(num_scenes: int = 2000) -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the world is one token and no text is unknown."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blank = Qwen2Tokenizer().backend_tokenizer  # Qwen's normaliser, word pattern and decoder
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    core.train_from_iterator(corpus(num_scenes), trainer)
    state = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    """Trains and saves the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    build().save_pretrained(parser.parse_args().out)


if __name__ == "__main__":
    main()
