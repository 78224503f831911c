"""Lossless speculative decoding for video language models."""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, whose import takes 10 ms in which Ctrl-C would be a traceback
if TYPE_CHECKING:
    from typing import Any

    from specvlm.core.config import DraftConfig, EngineConfig, PruneConfig, SamplingConfig, VideoConfig
    from specvlm.core.errors import CapacityError, ConfigError, MediaError, SpecVLMError, UnsupportedModel
    from specvlm.engine.account import Generation
    from specvlm.engine.api import Round, SpecVLM
    from specvlm.engine.request import Request
    from specvlm.engine.text import Chunk
    from specvlm.families import family
    from specvlm.media import Frames
    from specvlm.prune import pruner
    from specvlm.speculate.drafters import drafter
    from specvlm.speculate.policy import policy

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
    "drafter",
    "family",
    "policy",
    "pruner",
]

_HOMES = {  # modules are imported when a name is first asked for: some need torch, which takes 3 to 5 seconds
    "CapacityError": "core.errors",
    "Chunk": "engine.text",
    "ConfigError": "core.errors",
    "DraftConfig": "core.config",
    "EngineConfig": "core.config",
    "Frames": "media",
    "Generation": "engine.account",
    "MediaError": "core.errors",
    "PruneConfig": "core.config",
    "Request": "engine.request",
    "Round": "engine.api",
    "SamplingConfig": "core.config",
    "SpecVLM": "engine.api",
    "SpecVLMError": "core.errors",
    "UnsupportedModel": "core.errors",
    "VideoConfig": "core.config",
    "drafter": "speculate.drafters",
    "family": "families",
    "policy": "speculate.policy",
    "pruner": "prune",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names beside the others: what is imported late is not among the module's own yet."""
    return sorted({*globals(), *__all__})
