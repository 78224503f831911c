"""Videos of a wanted number of visual tokens, made on the fly."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from specvlm.core.config import VideoConfig
from specvlm.families import family_for
from specvlm.media import Frames, load
from specvlm_bench.sweep import Sweep

PROMPT = "Describe step by step what the video shows."  # a prompt of 64 text tokens in planted Qwen2.5-VL and LLaVA
_FPS = 2.0
_CHUNK = 32  # frames made at once


@dataclass(frozen=True)
class Shown:
    """What the models are shown: a film, or random frames of about so many visual tokens."""

    visual_tokens: int = 0
    film: str | None = None  # a path or URL

    def frames(self, config: Any, device: torch.device) -> Frames:
        """Return the frames for the model of a Hugging Face config.

        Raises:
            MediaError: the film cannot be read.
        """
        return clip(config, self.visual_tokens, device) if self.film is None else load(self.film, VideoConfig())

    def pair(self, name: str) -> str:
        """Return a pair's name with the film's, so that films of one length are told apart."""
        return name if self.film is None else f"{name}, {os.path.basename(self.film)}"

    def __str__(self) -> str:
        return "random smooth frames, no film" if self.film is None else self.film


def shown_in(sweep: Sweep) -> list[Shown]:
    """Return what the models are shown, one after another."""
    return [Shown(film=film) for film in sweep.clips] or [Shown(count) for count in sweep.visual_tokens]


def clip(config: Any, visual_tokens: int, device: torch.device, seed: int = 0) -> Frames:
    """Return random smooth frames of about `visual_tokens` visual tokens, as a video decoder would hand them over.

    Args:
        config: the Hugging Face config of the model that will see them.
        visual_tokens: how many it should see; the count is the nearest that whole time steps give.
        device: where the frames are made; they come back on the CPU.
        seed: of the frames.
    """
    shape = family_for(config.model_type).video_shape(config, visual_tokens)
    times = torch.arange(shape.num_frames, dtype=torch.float64) / _FPS
    return Frames(_pixels(shape.num_frames, shape.side, device, seed), times, _FPS)


def reachable(config: Any, visual_tokens: int) -> int:
    """Return how many visual tokens `clip` really gives."""
    return family_for(config.model_type).video_shape(config, visual_tokens).num_tokens


def _pixels(count: int, side: int, device: torch.device, seed: int) -> torch.Tensor:
    """Return [count, 3, side, side] uint8."""
    dice = torch.Generator().manual_seed(seed)
    chunks = []
    for coarse in torch.split(torch.rand(count, 3, 7, 7, generator=dice), _CHUNK):
        smooth = F.interpolate(coarse.to(device), (side, side), mode="bilinear")
        chunks.append((smooth * 255).to(torch.uint8).cpu())
    return torch.cat(chunks)
