"""The only per-model code: one file a family, registered under the model_type of its Hugging Face config."""

from specvlm.families import llava_onevision, qwen_vl
from specvlm.families.base import Family, Inputs, Message, Prompt, Visual, family_for, parts, register, source_of

__all__ = [
    "Family",
    "Inputs",
    "Message",
    "Prompt",
    "Visual",
    "family_for",
    "llava_onevision",
    "parts",
    "qwen_vl",
    "register",
    "source_of",
]
