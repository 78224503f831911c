"""Which settings were given and change nothing, and why: each is told by name, so that nobody waits for an effect."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import fields

from specvlm import prune
from specvlm.core.config import DraftConfig, EngineConfig, PruneConfig
from specvlm.core.errors import SpecVLMWarning


class SettingWarning(SpecVLMWarning):
    """A setting was given that has no effect beside the others."""


_PRUNING = frozenset(field.name for field in fields(PruneConfig))
_DRAFTING = frozenset(field.name for field in fields(DraftConfig)) - {"drafter"}
_SAMPLING = ("seed", "top_p", "top_k", "min_p")
_SCORING = ("score_rows", "score_layers")
_OPTIONS = {"mass": "mass", "focus": "focus", "spacing": "spacing", "window": "window", "prune_seed": "seed"}


def without_effect(config: EngineConfig, given: Collection[str], drafter: str, *, prunes: bool) -> list[str]:
    """Return a line for each setting that was given and is not read.

    Args:
        config: all that is in force.
        given: names of the settings that were given.
        drafter: who drafts, as in DraftConfig; "none" also where there is no draft.
        prunes: whether visual tokens are pruned at all.
    """
    reasons = _of_drafting(drafter) | _of_pruning(config, drafter, prunes) | _of_sampling(config)
    if config.video.num_frames is not None:
        reasons["max_frames"] = "num_frames says how many frames are read"
    return [f"{name} has no effect: {reasons[name]}" for name in given if name in reasons]


def _of_drafting(drafter: str) -> dict[str, str]:
    if drafter == "none":
        return dict.fromkeys(_DRAFTING, "nothing is drafted")
    if drafter == "lookup":
        return dict.fromkeys(("lookup_tokens", "refresh"), "drafter 'lookup' does not read it")
    if drafter == "model":
        return {"refresh": "it belongs to drafter 'self'"}
    return {}


def _of_pruning(config: EngineConfig, drafter: str, prunes: bool) -> dict[str, str]:
    if not prunes:
        reason = "nothing is drafted" if drafter == "none" else f"drafter {drafter!r} prunes nothing"
        return dict.fromkeys(_PRUNING, reason)
    name = config.prune.pruner
    reasons = {}
    if config.prune.keep_tokens is not None:
        reasons["keep_ratio"] = "keep_tokens says how many visual tokens are kept"
    wanted = inspect.signature(prune.get(name)).parameters
    reasons |= {key: f"pruner {name!r} does not read it" for key, own in _OPTIONS.items() if own not in wanted}
    if not prune.reads_scores(name):
        reasons |= dict.fromkeys(_SCORING, f"pruner {name!r} reads no scores")
    if name == "none":
        reasons |= dict.fromkeys(_PRUNING - {"pruner", "positions"}, "pruner 'none' keeps all")
    return reasons


def _of_sampling(config: EngineConfig) -> dict[str, str]:
    return {} if config.sampling.temperature else dict.fromkeys(_SAMPLING, "temperature is 0, which is greedy")
