"""What `bench speed` measures, by name: methods, their settings, and the drafts that they need.

Nothing here imports torch, so that a wrong name or number is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from specvlm.core import tree
from specvlm.core.config import EngineConfig
from specvlm.core.errors import ConfigError
from specvlm.core.names import QUANTS
from specvlm_bench.names import PEERS, PLANTED_DRAFTS

ENGINE_METHODS = ("plain", "chain", "tree", "auto", "self", "lookup")
METHODS = (*ENGINE_METHODS, *PEERS, "vllm-plain")
NO_QUANT = "none"


@dataclass(frozen=True)
class Layers:
    """Whose layers draft, and in how many bits."""

    drafter: str  # "model": the smaller one; "self": the target's own
    quant: str | None = None  # a format of names.QUANTS


@dataclass(frozen=True)
class Sweep:
    """What is measured, and how often."""

    visual_tokens: tuple[int, ...] = (16384,)
    keep_ratios: tuple[float, ...] = (0.1,)
    trees: tuple[str, ...] = ("paper", "chain:5")
    methods: tuple[str, ...] = METHODS
    draft_quants: tuple[str, ...] = (NO_QUANT,)  # of every method that drafts with a model
    planted_drafts: tuple[str, ...] = ("published",)  # of auto; empty: real checkpoints
    clips: tuple[str, ...] = ()  # films to show, in place of frames of so many visual tokens
    answer_tokens: tuple[int, ...] = ()  # whole answers of so many tokens, in place of times a token
    num_tokens: int = 256
    repeats: int = 5
    slow_repeats: int = 2  # of prefills and of other engines' answers

    def __post_init__(self) -> None:
        for name in ("visual_tokens", "keep_ratios", "trees", "methods", "draft_quants"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: name at least one")
        for name, least in (("num_tokens", 2), ("repeats", 1), ("slow_repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed: at least {least}")
        choices_of = {"methods": METHODS, "draft_quants": (NO_QUANT, *QUANTS), "planted_drafts": PLANTED_DRAFTS}
        for name, known in choices_of.items():
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ConfigError(f"{name[:-1]} {unknown[0]!r} is not known: choose from {', '.join(known)}")
        self._check_answers()
        if low := [count for count in self.visual_tokens if count < 1]:
            raise ConfigError(f"visual_tokens={low[0]} is not allowed: at least 1")
        for ratio in self.keep_ratios:
            EngineConfig().replace(keep_ratio=ratio)
        for spec in self.trees:
            tree.parse(spec)

    def _check_answers(self) -> None:
        if low := [count for count in self.answer_tokens if count < 1]:
            raise ConfigError(f"answer_tokens={low[0]} is not allowed: at least 1")
        if others := [method for method in self.methods if self.answer_tokens and method not in ENGINE_METHODS]:
            raise ConfigError(f"method {others[0]!r} is not allowed for whole answers: {', '.join(ENGINE_METHODS)}")

    def cells(self) -> list[Cell]:
        """Return what is measured at one number of visual tokens, vLLM left out; this engine's methods come first."""
        found = [cell for method in self.methods if method != "vllm-plain" for cell in self._cells_of(method)]
        return sorted(found, key=lambda cell: cell.method not in ENGINE_METHODS)

    def _cells_of(self, method: str) -> list[Cell]:
        if method == "transformers-assisted":
            return [Cell(method, layers=Layers("model"))]
        if method not in ("chain", "tree", "auto", "self"):
            return [Cell(method)]
        is_planted = bool(self.planted_drafts)
        trees: Sequence[str | None] = [None]
        drafts: Sequence[str | None] = ["published" if is_planted else None]
        if method in ("chain", "tree"):
            trees = [spec for spec in self.trees if spec.startswith("chain:") == (method == "chain")]
        elif method == "self":
            drafts = ["self" if is_planted else None]
        else:
            drafts = self.planted_drafts or [None]
        kind = "self" if method == "self" else "model"
        layers = [Layers(kind, None if quant == NO_QUANT else quant) for quant in self.draft_quants]
        return [Cell(method, *rest) for rest in product(self.keep_ratios, trees, layers, drafts)]

    def groups(self) -> list[tuple[Layers | None, list[Cell]]]:
        """Return the cells by the layers that draft for them, which are in memory one after another.

        Cells that draft without a model stand with the smaller model as it is, or with the first group there is.
        """
        cells = self.cells()
        order = list(dict.fromkeys(cell.layers for cell in cells if cell.layers))
        if not order:
            return [(None, cells)] if cells else []
        host = Layers("model") if Layers("model") in order else order[0]
        order.sort(key=lambda layers: layers != host)
        return [(layers, [cell for cell in cells if (cell.layers or host) == layers]) for layers in order]


@dataclass(frozen=True)
class Cell:
    """One method with its settings, which are None where it has none."""

    method: str
    keep_ratio: float | None = None
    tree: str | None = None
    layers: Layers | None = None
    planted_draft: str | None = None

    def settings(self, sweep: Sweep) -> dict[str, Any]:
        """Return the engine's settings."""
        common = {"max_new_tokens": sweep.num_tokens, "repetition_penalty": 1.0}
        if self.layers is None:
            return common | {"drafter": "none" if self.method == "plain" else self.method}
        chosen = {"tree": self.tree or "dynamic", "policy": "fixed" if self.tree else "auto"}
        pruned = {"pruner": "verifier", "keep_ratio": self.keep_ratio}
        return common | chosen | pruned | {"drafter": self.layers.drafter}

    @property
    def names(self) -> dict[str, Any]:
        """The record's fields that say which cell it is of."""
        layers = self.layers if self.method in ENGINE_METHODS else None
        return {
            "method": self.method,
            "keep_ratio": self.keep_ratio,
            "tree": self.tree,
            "drafter": layers.drafter if layers else "lookup" if self.method == "lookup" else None,
            "draft_quant": (layers.quant or NO_QUANT) if layers else None,
            "planted_draft": self.planted_draft,
        }

    def __str__(self) -> str:
        quant = self.layers.quant if self.layers else None
        parts = (self.method, self.tree, self.keep_ratio, quant, self.planted_draft)
        return " ".join(str(part) for part in parts if part is not None)
