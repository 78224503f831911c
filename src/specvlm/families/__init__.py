"""The only per-model code: one file a family, registered under the model_type of its Hugging Face config."""

from specvlm.families import llava_onevision, qwen_vl
from specvlm.families.base import Family, Features, Inputs, Prompt, Size, VideoShape, Visual, family, family_for
from specvlm.families.messages import Medium, Message, clean, last_words, parse, texts
from specvlm.families.pixels import Limits

__all__ = [
    "Family",
    "Features",
    "Inputs",
    "Limits",
    "Medium",
    "Message",
    "Prompt",
    "Size",
    "VideoShape",
    "Visual",
    "clean",
    "family",
    "family_for",
    "last_words",
    "llava_onevision",
    "parse",
    "qwen_vl",
    "texts",
]
