"""Lossless speculative decoding for video language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specvlm.config import DraftConfig, EngineConfig, PruneConfig, SamplingConfig, VideoConfig
from specvlm.errors import CapacityError, ConfigError, MediaError, SpecVLMError, UnsupportedModel

if TYPE_CHECKING:
    from specvlm.account import Generation
    from specvlm.engine import Round, SpecVLM
    from specvlm.media import Frames
    from specvlm.prune import pruner
    from specvlm.request import Request
    from specvlm.text import Chunk

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

_HEAVY = {  # names whose module imports torch: 3 to 5 seconds, which `specvlm --help` need not wait for
    "Chunk": "text",
    "Frames": "media",
    "Generation": "account",
    "Request": "request",
    "Round": "engine",
    "SpecVLM": "engine",
    "pruner": "prune",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HEAVY[name]}"), name)
