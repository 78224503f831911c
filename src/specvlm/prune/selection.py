"""Which visual tokens the draft sees: (scores, grid, count) -> kept indices.

A pruner is one small function in a registry:

    @pruner("verifier")
    def verifier(scores, grid, count, *, mass=0.4): ...

It gets scores [V] float32 (the target's attention to each visual token; zeros for a pruner registered with
`scored=False`), grid [V, 3] int64 (time step, row, column) and count, and returns at most `count` distinct indices.
Of the settings it gets those that it names as keyword-only parameters: mass, focus, spacing, window, seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specvlm.core import checks
from specvlm.core.config import PruneConfig, shown
from specvlm.core.errors import ConfigError, SpecVLMError, one_line

Pruner = Callable[..., Tensor]
PRUNERS: dict[str, Pruner] = {}
_SCORED: set[str] = set()


def pruner(name: str, *, scored: bool = True) -> Callable[[Pruner], Pruner]:
    """Register a pruner under its name; `scored=False` says that it needs no attention scores."""

    def add(function: Pruner) -> Pruner:
        PRUNERS[name] = function
        if scored:
            _SCORED.add(name)
        return function

    return add


def reads_scores(name: str) -> bool:
    """Whether the pruner of that name reads the target's attention."""
    return name in _SCORED


def needs_scores(config: PruneConfig) -> bool:
    """Whether this config's pruner reads the target's attention."""
    return reads_scores(config.pruner) and not keeps_all(config)


def get(name: str) -> Pruner:
    """Return the pruner of that name.

    Raises:
        ConfigError: there is none; the message lists the known.
    """
    checks.known("pruner", name, PRUNERS)
    return PRUNERS[name]


def select(scores: Tensor, grid: Tensor, visual_id: Tensor, config: PruneConfig) -> Tensor:
    """Return the kept visual tokens, [K] int64 ascending.

    Args:
        scores: [V] float32, attention of the target.
        grid: [V, 3] int64, time step, row and column of each token within its video or image.
        visual_id: [V] int64, ascending: which video or image a token belongs to.
        config: pruner, budget and options.
    """
    function, total = get(config.pruner), scores.shape[0]
    if keeps_all(config) or total == 0:
        return torch.arange(total, device=scores.device)
    wanted = inspect.signature(function).parameters
    options = {name: value for name, value in _options(config).items() if name in wanted}
    if not config.per_visual:
        count = budget(config, total)
        chosen = _chosen(config.pruner, scores, _stack_visuals(grid, visual_id), count, options)
        return _checked(chosen, config.pruner, count, total).to(scores.device)
    kept, start = [], 0
    sizes = torch.unique_consecutive(visual_id, return_counts=True)[1].tolist()
    for size, count in zip(sizes, shares(sizes, budget(config, total)), strict=True):
        part = slice(start, start + size)
        chosen = _chosen(config.pruner, scores[part], grid[part], count, options)
        kept.append(_checked(chosen, config.pruner, count, size) + start)
        start += size
    return torch.cat(kept).to(scores.device)


def _chosen(name: str, scores: Tensor, grid: Tensor, count: int, options: Mapping[str, Any]) -> object:
    """Return what a pruner returns.

    Raises:
        ConfigError: it failed.
    """
    try:
        return PRUNERS[name](scores, grid, count, **options)
    except (SpecVLMError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"pruner {name!r} failed: {type(error).__name__}: {one_line(error)}; mend it") from error


def _checked(found: object, name: str, count: int, total: int) -> Tensor:
    """Return what a pruner kept, ascending.

    Raises:
        ConfigError: it is no tensor of indices, or more than were asked for, or holds one twice or what is not there.
    """
    if not isinstance(found, Tensor) or found.dim() != 1 or found.dtype not in (torch.int64, torch.int32):
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else shown(found)
        raise ConfigError(f"pruner {name!r} returned {what}: a tensor [K] of int64 indices is wanted; mend it")
    kept = found.long().sort().values
    is_within = kept.shape[0] <= count and bool(((kept >= 0) & (kept < total)).all())
    if not is_within or bool((kept[1:] == kept[:-1]).any()):
        wanted = f"at most {count} distinct indices from 0 to {total - 1}"
        raise ConfigError(f"pruner {name!r} returned {kept.shape[0]} indices that are not {wanted}: mend it")
    return kept


def budget(config: PruneConfig, total: int) -> int:
    """Return how many of `total` visual tokens may be kept, at least 1."""
    count = config.keep_tokens if config.keep_tokens is not None else round(config.keep_ratio * total)
    return min(total, max(1, count))


def shares(sizes: Sequence[int], budget: int) -> list[int]:
    """Return the budget split in proportion to the sizes, in whole tokens that add up to it (largest remainders)."""
    total = sum(sizes)
    counts = [budget * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda visual: budget * sizes[visual] % total, reverse=True)
    for visual in order[: budget - sum(counts)]:
        counts[visual] += 1
    return counts


def scoring_layers(config: PruneConfig, num_layers: int) -> frozenset[int] | None:
    """Return the decoder layers whose attention scores, None for all of them.

    Raises:
        ConfigError: there is no such layer.
    """
    if config.score_layers == "all":
        return None
    named = [-1] if config.score_layers == "last" else [int(layer) for layer in config.score_layers.split(",")]
    if wrong := [layer for layer in named if not -num_layers <= layer < num_layers]:
        allowed = f"layers 0 to {num_layers - 1}, or negative ones from the end"
        raise ConfigError(f"score_layers={config.score_layers!r} is not allowed ({wrong[0]}): {allowed}")
    return frozenset(layer % num_layers for layer in named)


def keeps_all(config: PruneConfig) -> bool:
    """Whether this config prunes nothing."""
    return config.pruner == "none" or (config.keep_tokens is None and config.keep_ratio == 1)


def _options(config: PruneConfig) -> dict[str, Any]:
    return {
        "mass": config.mass,
        "spacing": config.spacing,
        "window": config.window,
        "focus": config.focus,
        "seed": config.prune_seed,
    }


def _stack_visuals(grid: Tensor, visual_id: Tensor) -> Tensor:
    """Put one visual's time steps behind the last's, so that several share one grid."""
    if visual_id[0] == visual_id[-1]:
        return grid
    last = torch.zeros(int(visual_id.max()) + 1, dtype=torch.int64, device=grid.device)
    last.scatter_reduce_(0, visual_id, grid[:, 0] + 1, "amax")
    before = last.cumsum(0) - last
    return torch.stack([grid[:, 0] + before[visual_id], grid[:, 1], grid[:, 2]], 1)
