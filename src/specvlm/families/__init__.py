"""The only per-model code: one file a family, registered under the model_type of its Hugging Face config."""

from specvlm.families import llava_onevision, qwen_vl
from specvlm.families.base import Family, Inputs, Prompt, Visual, family_for, register

__all__ = ["Family", "Inputs", "Prompt", "Visual", "family_for", "llava_onevision", "qwen_vl", "register"]
