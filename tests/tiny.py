"""Tiny random checkpoints of every family, saved as full HF directories: model, tokenizer, processor files.

`checkpoint(family, part)` builds one in about a second, once a test session. `part` is "target", "draft" (smaller: it
agrees with the target only by chance) or "near" (the target with some noise: a draft that is often right); all share a
tokenizer and the video grid. Greedy text of the random models varies from token to token and never ends by itself:
a test of EOS names some ordinary token that the text holds.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from specvlm.families import family_for
from specvlm.media import Frames

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>", "<image>", "<video>"]  # fmt: skip
CORPUS = [
    "You are a helpful assistant. system user assistant",
    "Describe the video. What happens in the image? The red ball rolls to the left, then two more follow it.",
    "<0.5 seconds> <1.0 seconds> <12.5 seconds>",
]
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}PLACEHOLDER
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
QWEN_PLACEHOLDER = "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
LLAVA_PLACEHOLDER = "<{{ part['type'] }}>\n"

TILE = 35  # pixels a side of LLaVA's frames and tiles: 5 x 5 features, 3 x 3 once pooled
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (3, 1, 4, 2) for columns in (4, 2, 1, 3)]  # no order helps

_root = Path(tempfile.mkdtemp(prefix="specvlm-tiny-"))
atexit.register(shutil.rmtree, _root, ignore_errors=True)


def tokenizer(placeholder: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with Qwen-style special tokens and a chat template of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.replace("PLACEHOLDER", placeholder),
    )


def _text(part: str, vocab_size: int, **extra: Any) -> dict[str, Any]:
    small = part == "draft"
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32 if small else 64,
        "intermediate_size": 64 if small else 96,
        "num_hidden_layers": 2 if small else 3,
        "num_attention_heads": 2 if small else 4,
        "num_key_value_heads": 1 if small else 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
        **extra,
    }


def _qwen(part: str, ids: dict[str, int], vocab_size: int, text: dict[str, Any], vision: dict[str, Any]) -> dict:
    return {
        "text_config": _text(part, vocab_size, **text),
        "vision_config": {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2_vl(part: str, ids: dict[str, int], vocab_size: int) -> Any:
    width = 32 if part == "draft" else 64
    vision = {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**_qwen(part, ids, vocab_size, {}, vision)))


def _qwen2_5_vl(part: str, ids: dict[str, int], vocab_size: int) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32 if part == "draft" else 64,
              "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_qwen(part, ids, vocab_size, {}, vision)))


def _qwen3_vl(part: str, ids: dict[str, int], vocab_size: int) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32 if part == "draft" else 64,
              "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    text = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2], "mrope_interleaved": True}}  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_qwen(part, ids, vocab_size, text, vision)))


def _llava_onevision(part: str, ids: dict[str, int], vocab_size: int) -> Any:
    text = _text(part, vocab_size + 16 * (part == "draft"), model_type="qwen2")  # as 0.5B and 7B: padded differently
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": TILE, "patch_size": 7, "vision_use_head": False}  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            image_grid_pinpoints=PINPOINTS,
        )
    )


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
}


def processors(family: str) -> dict[str, Any]:
    """The processor files of a real checkpoint of the family, with small pixel bounds."""
    if family == "llava_onevision":
        return _llava_processors()
    patch = 16 if family == "qwen3_vl" else 14
    cell = (2 * patch) ** 2
    common = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    if family == "qwen3_vl":
        common |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    image = {**common, "image_processor_type": "Qwen2VLImageProcessor",
             "size": {"shortest_edge": 4 * cell, "longest_edge": 24 * cell}}  # fmt: skip
    name = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    most = 96 if family == "qwen3_vl" else 12  # cells of all frames, or of one
    video = {**common, "video_processor_type": name,
             "size": {"shortest_edge": 4 * cell, "longest_edge": most * cell}}  # fmt: skip
    names = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    return {
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": {"processor_class": names[family]},
    }


def _llava_processors() -> dict[str, Any]:
    """Everything in processor_config.json, as transformers 5 saves it."""
    size = {"size": {"height": TILE, "width": TILE}}
    image = {**size, "image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS}
    return {
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_processor": image,
            "video_processor": {**size, "video_processor_type": "LlavaOnevisionVideoProcessor"},
            "num_image_tokens": (TILE // 7) ** 2,
            "vision_feature_select_strategy": "full",
        }
    }


def _only_ordinary_tokens(model: Any, first_special: int) -> None:
    """Let no special token, and no id that the tokenizer lacks, win."""
    with torch.no_grad():
        model.get_output_embeddings().weight[first_special:] = 0


def _perturb(model: Any, scale: float) -> None:
    """Add noise of `scale` times its own size to the output head."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head += scale * head.std() * torch.randn(head.shape)


@cache
def checkpoint(family: str, part: str = "target", seed: int = 0) -> str:
    """Build and save a checkpoint; return its directory."""
    directory = _root / f"{family}-{part}-{seed}"
    tok = tokenizer(LLAVA_PLACEHOLDER if family == "llava_onevision" else QWEN_PLACEHOLDER)
    ids = {token: tok.convert_tokens_to_ids(token) for token in SPECIALS}
    state = torch.random.get_rng_state()
    torch.manual_seed(1000 * seed + (part == "draft"))
    model = _BUILDERS[family](part, ids, -(-len(tok) // 16) * 16)
    torch.random.set_rng_state(state)
    if part == "near":
        _perturb(model, scale=0.1)
    _only_ordinary_tokens(model, min(ids.values()))
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    for name, content in processors(family).items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return str(directory)


_CLASSES = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}


@cache
def load(family: str, part: str = "target", seed: int = 0) -> tuple[Any, Any]:
    """Return (HF model in eval mode, Family) of a checkpoint; the model is shared: leave it as it is."""
    directory = checkpoint(family, part, seed)
    model = _CLASSES[family].from_pretrained(directory, dtype=torch.float32).eval()
    return model, family_for(family)(directory, model.config, AutoTokenizer.from_pretrained(directory))


def encode(family: Any, model: Any, inputs: Any) -> Any:
    """Return the Prompt of inputs."""
    return family.merge(model, inputs, family.encode_visual(model, inputs))


def video(num_frames: int = 4, height: int = 56, width: int = 84, fps: float = 2.0, seed: int = 0) -> Frames:
    """Random but smooth frames."""
    return Frames(_pixels(num_frames, height, width, seed), torch.arange(num_frames, dtype=torch.float64) / fps, fps)


def image(height: int = 56, width: int = 84, seed: int = 0) -> Frames:
    """One random but smooth image."""
    return Frames(_pixels(1, height, width, seed), torch.zeros(1, dtype=torch.float64), 1.0, "image")


def _pixels(num: int, height: int, width: int, seed: int) -> torch.Tensor:
    coarse = torch.rand(num, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def messages(*parts: str, system: str | None = None) -> list[dict[str, Any]]:
    """One user turn: "video" and "image" stand for media, anything else is text."""
    content = [{"type": part} if part in ("video", "image") else {"type": "text", "text": part} for part in parts]
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]
