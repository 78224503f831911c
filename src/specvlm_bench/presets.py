"""Named settings of published experiments, to be run on data and models of your own choice.

A preset says what is asked about which data, and every setting that the publication fixes. What it leaves open (the
models, their precision, the number of samples) stays with the caller. Two things follow the method rather than the
authors' program, which switches Qwen's rotary positions off and numbers the kept tokens anew: the models' own positions
are used, and kept tokens keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from specvlm.core.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """What a published experiment fixes."""

    data: str  # a name that bench.data.read knows
    ask: str  # and how it asks there
    settings: Mapping[str, Any]  # as EngineConfig.replace takes them
    source: str  # where the numbers come from


_PAPER = {
    "max_pixels": 448 * 448,  # of a frame; LLaVA-OneVision's are smaller in any case
    "max_new_tokens": 256,
    "temperature": 0.0,
    "drafter": "model",
    "tree": "paper",
    "policy": "fixed",
    "pruner": "verifier",
    "keep_ratio": 0.1,
    "mass": 0.4,
    "focus": 1.0,  # stage I may choose all of them
    "spacing": "sequence",
}
_SOURCE = (
    "SpecVLM (arXiv 2508.16201): 256 new tokens, greedy, pruning ratio 0.9, descriptions asked on every data set; the "
    "authors' program (inference.py, utils/utils.py): lambda 0.4, spacing along the sequence, 448 x 448 pixels"
)


def _paper(num_frames: int, frames: str) -> Preset:
    settings = MappingProxyType(_PAPER | {"num_frames": num_frames})
    return Preset("videodetailcaption", "describe", settings, f"{_SOURCE}; {num_frames} frames: {frames}")


PRESETS = {
    "paper-7b": _paper(128, "the paper's for 7B targets"),
    "paper-32b": _paper(64, "the authors' script for Qwen2.5-VL (run_qwenvl.sh)"),
    "paper-72b": _paper(64, "the paper's for 72B targets"),
}


def preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        ConfigError: it is unknown; the known ones are listed.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r} is unknown: give {', '.join(PRESETS)}")
    return PRESETS[name]
