"""The shapes of the published checkpoints that `bench speed` plants, and the same models shrunk for tests.

Values are those of the config.json of Qwen/Qwen2.5-VL-{32B,7B,3B}-Instruct, Qwen/Qwen3-VL-{8B,2B}-Instruct and
llava-hf/llava-onevision-qwen2-{7b,0.5b}-ov-hf. LLaVA's vocabularies are Qwen2's 152,064 and 151,936 with 3 tokens more,
padded to a multiple of 64.

Two things differ from the published configs, neither of which changes what a decoding step reads:
- The bound on positions is lifted to 262,144 (it is a check; these models' rotary embeddings do not scale with it).
- Output heads are never tied. The 3B, the 2B and the 0.5B tie theirs to the embeddings, and a tied head cannot be
  planted: its best next token is always the current one. The head read in each step has the same bytes; the separate
  embedding table adds memory (0.3 to 0.6 GB) and no reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specvlm.core.errors import ConfigError

_FIRST_SPECIAL = 151643  # the first id after Qwen2's ordinary tokens
_QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_LLAVA_SPECIALS = (*_QWEN_SPECIALS[:3], "<image>", "<video>")
_MAX_POSITIONS = 1 << 18

_LLAVA_NAMED = {"image_token_index": "<image>", "video_token_index": "<video>"}
_QWEN_NAMED = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_TINY_TEXT = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
_TINY_HEAD_DIM = 64


@dataclass(frozen=True)
class Spec:
    """One checkpoint's shapes and special tokens."""

    name: str
    model_type: str
    text: Mapping[str, Any]  # of the text_config
    vision: Mapping[str, Any]  # of the vision_config
    specials: tuple[str, ...]  # in the order of their ids
    first_special: int  # id of the first of them
    cycle: tuple[int, int]  # ids from, to (exclusive) of the ordinary tokens that planted text consists of
    placeholder: str  # what the chat template writes for a video
    named: Mapping[str, str]  # the special token that each key of the Hugging Face config gives the id of

    @property
    def ids(self) -> dict[str, int]:
        """The special tokens' ids."""
        return {token: self.first_special + place for place, token in enumerate(self.specials)}

    @property
    def eos(self) -> str:
        """The token that ends a text."""
        return "<|im_end|>"

    def config(self) -> dict[str, Any]:
        """Return the keyword arguments of the Hugging Face config."""
        text = {**self.text, "max_position_embeddings": _MAX_POSITIONS, "tie_word_embeddings": False}
        config = {"text_config": text, "vision_config": dict(self.vision), "tie_word_embeddings": False}
        return config | {key: self.ids[token] for key, token in self.named.items()}

    def shrunk(self) -> Spec:
        """Return a model of the same architecture with a few million weights, for checks on a CPU."""
        text = {**self.text, **_TINY_TEXT}
        half = _TINY_HEAD_DIM // 2
        if "head_dim" in text:
            text["head_dim"] = _TINY_HEAD_DIM
        if "mrope_section" in text["rope_parameters"]:
            text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [half // 2, half // 4, half // 4]}
        return Spec(
            f"{self.name}-tiny",
            self.model_type,
            text,
            {**self.vision, **_TINY_VISION[self.model_type]},
            self.specials,
            first_special=2000,
            cycle=(300, 1900),
            placeholder=self.placeholder,
            named=self.named,
        )


def _qwen_text(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,  # the generation config has it
    }


def _rope(theta: float, **extra: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **extra}}


def _spec(size: str, model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Spec:
    is_llava = model_type == "llava_onevision"
    placeholder = "<video>\n" if is_llava else "<|vision_start|><|video_pad|><|vision_end|>"
    specials = _LLAVA_SPECIALS if is_llava else _QWEN_SPECIALS
    named = _LLAVA_NAMED if is_llava else _QWEN_NAMED
    return Spec(size, model_type, text, vision, specials, _FIRST_SPECIAL, (2_000, 90_000), placeholder, named)


def _qwen2_5(size: str, inner_vision: int, *shape: int) -> Spec:
    text = _qwen_text(*shape) | _rope(1e6, mrope_section=[16, 24, 24])
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": inner_vision, "num_heads": 16, "patch_size": 14,
              "out_hidden_size": shape[0], "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
              "tokens_per_second": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    return _spec(f"qwen2.5-vl-{size}", "qwen2_5_vl", text, vision)


def _qwen3(size: str, vision: dict[str, Any], *shape: int) -> Spec:
    text = _qwen_text(*shape) | {"head_dim": 128, "attention_bias": False}
    text |= _rope(5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)
    common = {"num_heads": 16, "patch_size": 16, "out_hidden_size": shape[0], "num_position_embeddings": 2304,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    return _spec(f"qwen3-vl-{size}", "qwen3_vl", text, vision | common)


def _llava(size: str, *shape: int) -> Spec:
    text = _qwen_text(*shape) | _rope(1e6) | {"model_type": "qwen2"}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
              "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
              "vision_use_head": False}  # fmt: skip
    return _spec(f"llava-onevision-{size}", "llava_onevision", text, vision)


_TINY_QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                     "out_hidden_size": _TINY_TEXT["hidden_size"]}  # fmt: skip
_TINY_VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": _TINY_QWEN_VISION | {"fullatt_block_indexes": [1]},
    "qwen3_vl": _TINY_QWEN_VISION | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    "llava_onevision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "image_size": 56},
}  # fmt: skip
_LARGE_QWEN3_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
                       "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
_SMALL_QWEN3_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
                       "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip

# width, MLP width, layers, heads, KV heads, vocabulary
SPECS = {
    spec.name: spec
    for spec in (
        _qwen2_5("32b", 3456, 5120, 27648, 64, 40, 8, 152064),
        _qwen2_5("7b", 3420, 3584, 18944, 28, 28, 4, 152064),
        _qwen2_5("3b", 3420, 2048, 11008, 36, 16, 2, 151936),
        _qwen3("8b", _LARGE_QWEN3_VISION, 4096, 12288, 36, 32, 8, 151936),
        _qwen3("2b", _SMALL_QWEN3_VISION, 2048, 6144, 28, 16, 8, 151936),
        _llava("7b", 3584, 18944, 28, 28, 4, 152128),
        _llava("0.5b", 896, 4864, 24, 14, 2, 152000),
    )
}
DEFAULT_PAIRS = "qwen2.5-vl-32b/7b,qwen3-vl-8b/2b,llava-onevision-7b/0.5b"


def pair(name: str, *, is_tiny: bool = False) -> tuple[Spec, Spec]:
    """Return target and draft of a pair such as "qwen2.5-vl-32b/7b".

    Raises:
        ConfigError: it is malformed or names an unknown model; the known ones are listed.
    """
    target, slash, size = name.partition("/")
    draft = f"{target.rpartition('-')[0]}-{size}"
    if not slash or target not in SPECS or draft not in SPECS:
        known = ", ".join(sorted(SPECS))
        raise ConfigError(f"pair {name!r} is not known: write TARGET/SIZE, such as qwen2.5-vl-32b/7b, from {known}")
    specs = SPECS[target], SPECS[draft]
    return (specs[0].shrunk(), specs[1].shrunk()) if is_tiny else specs
