"""Lossless speculative decoding for video language models."""

from specvlm.config import DraftConfig, EngineConfig, PruneConfig, SamplingConfig, VideoConfig
from specvlm.engine import Request, Round, SpecVLM
from specvlm.errors import CapacityError, ConfigError, MediaError, SpecVLMError, UnsupportedModel
from specvlm.prune import pruner
from specvlm.report import Generation
from specvlm.text import Chunk
from specvlm.video import Frames

__all__ = [
    "CapacityError",
    "Chunk",
    "ConfigError",
    "DraftConfig",
    "EngineConfig",
    "Frames",
    "Generation",
    "MediaError",
    "PruneConfig",
    "Request",
    "Round",
    "SamplingConfig",
    "SpecVLM",
    "SpecVLMError",
    "UnsupportedModel",
    "VideoConfig",
    "pruner",
]
