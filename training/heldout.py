"""The held-out scenes, which training never draws."""

import torch
from torch import Tensor

from training.render import clip_pixels, pack
from training.world import Scene, sample_scene

HELD_OUT = 0  # first word of a held-out scene's seed; training draws from other words
LENGTHS = (16, 24, 32, 48, 64)  # sampled frames


def held_out(number: int) -> Scene:
    """The held-out scene of that number; lengths take turns."""
    return sample_scene((HELD_OUT, number), LENGTHS[number % len(LENGTHS)])


def pixels(scene: Scene, fps: float, noise: float = 1.0) -> Tensor:
    """Frames uint8 [T, 168, 168, 3] of one scene with `noise` times its grain, the same on every run."""
    generator = torch.Generator().manual_seed(scene.seed[-1])
    batch = pack([scene], fps)
    batch.noise.mul_(noise)
    return (clip_pixels(batch, fps, generator)[0] * 255).round().byte()
