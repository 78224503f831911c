"""Scenes to pixels: batched analytic drawing in plain torch, on any device.

Every object is drawn inside a WINDOW x WINDOW crop around its centre from a signed distance function, so that a
batch costs about as much as its objects cover. Pictures are channel-last: [B, T, FRAME, FRAME, 3], values in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.world import (
    BRIGHTNESS,
    COLOURS,
    DIRECTIONS,
    ENTRIES,
    FRAME,
    SAMPLED_FPS,
    SHAPES,
    SPEEDS,
    TEXTURES,
    Scene,
    Thing,
)

WINDOW = 48  # pixels; the largest object is 42 wide
DRIFT = 28  # pixels of background beyond the frame on each side
MAX_THINGS = 5
NO_DIGIT = 10
DOT = 0.12  # of the radius: a digit is 5 x 7 dots
PATCH, MERGE, TEMPORAL = 14, 2, 2  # Qwen's vision layout: a visual token is 28 x 28 pixels and two frames
CELL = PATCH * MERGE
CELLS = FRAME // CELL  # visual tokens a side
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_FONT = (  # 5 x 7 dots a digit
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


def _glyphs() -> Tensor:
    """[11, 9, 7]: 0 see-through, 1 dark rim, 2 white dot; the last is no digit."""
    dots = torch.tensor([[[int(dot) for dot in row] for row in glyph.split()] for glyph in _FONT], dtype=torch.float)
    dots = F.pad(dots, (1, 1, 1, 1))
    rims = F.max_pool2d(dots, 3, 1, 1)
    return torch.cat([dots + rims, torch.zeros(1, 9, 7)])


GLYPHS = _glyphs()


@dataclass
class Batch:
    """Scenes with equally many frames as arrays; N = MAX_THINGS, absent objects are never shown."""

    centre: Tensor  # [B, N, T, 2] pixels
    shown: Tensor  # [B, N, T] bool
    radius: Tensor  # [B, N] pixels
    shape: Tensor  # [B, N] index into SHAPES
    colour: Tensor  # [B, N] index into COLOURS
    digit: Tensor  # [B, N] 0..9 or NO_DIGIT
    motion: Tensor  # [B, N] 0 at rest, else 1 + direction * 2 + speed
    entry: Tensor  # [B, N] index into ENTRIES
    ground: Tensor  # [B, 7] level, angle, texture index, drift x, drift y, noise, seed

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`."""
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    @property
    def noise(self) -> Tensor:
        """Standard deviation [B] of the grain, of a range of 1."""
        return self.ground[:, 5]

    @property
    def num_frames(self) -> int:
        """Frames of each clip."""
        return self.centre.shape[2]


def pack(scenes: list[Scene], fps: float = SAMPLED_FPS) -> Batch:
    """The arrays of `scenes` at `fps` frames a second."""
    num_frames = round(scenes[0].seconds * fps)
    seconds = np.arange(num_frames) / fps
    shape = (len(scenes), MAX_THINGS)
    centre, shown = np.full((*shape, num_frames, 2), -99.0, np.float32), np.zeros((*shape, num_frames), bool)
    radius, index = np.ones(shape, np.float32), np.zeros((5, *shape), np.int64)
    for b, scene in enumerate(scenes):
        for n, thing in enumerate(scene.things):
            path = thing.path
            centre[b, n], shown[b, n], radius[b, n] = path.centres(seconds), path.visible(seconds), thing.radius
            index[:, b, n] = _classes(thing)
    ground = [_ground(scene) for scene in scenes]
    arrays = (centre, shown, radius, *index, np.array(ground, np.float32))
    return Batch(*(torch.from_numpy(array) for array in arrays))


def _classes(thing: Thing) -> tuple[int, ...]:
    """Shape, colour, digit, motion and entry as indices."""
    path, moving = thing.path, 0
    if path.direction:
        moving = 1 + 2 * list(DIRECTIONS).index(path.direction) + list(SPEEDS).index(path.speed)
    digit = NO_DIGIT if thing.digit is None else thing.digit
    return SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), digit, moving, ENTRIES.index(path.entry)


def _ground(scene: Scene) -> tuple[float, ...]:
    look = scene.look
    level = BRIGHTNESS[scene.brightness] + look["level"]
    seed = float(np.random.default_rng(scene.seed).integers(1 << 20))
    return (level, look["angle"], TEXTURES.index(scene.texture), look["drift_x"], look["drift_y"], look["noise"], seed)


# ------------------------------------------------------------------------------------------------------- background


def _texture(batch: Batch, generator: torch.Generator | None) -> Tensor:
    """Backgrounds [B, FRAME + 2 DRIFT, FRAME + 2 DRIFT, 3]."""
    level, angle, texture = batch.ground[:, :3, None, None].unbind(1)
    size, device, count = FRAME + 2 * DRIFT, level.device, len(level)

    def smooth(cells: int, channels: int) -> Tensor:
        coarse = torch.randn(count, channels, cells, cells, device=device, generator=generator)
        return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)

    axis = torch.arange(size, device=device, dtype=torch.float)
    along = axis * torch.cos(angle) + axis[:, None] * torch.sin(angle)  # [B, size, size]
    stripes = 0.07 * torch.sin(along * (2 * torch.pi / 22))
    spots = 0.13 * (smooth(22, 1)[:, 0] > 1.0) - 0.02
    pattern = torch.where(texture == TEXTURES.index("striped"), stripes, torch.zeros_like(stripes))
    pattern = torch.where(texture == TEXTURES.index("spotted"), spots, pattern)
    tint = 0.02 * torch.randn(count, 1, 1, 3, device=device, generator=generator)
    clutter = 0.02 * smooth(6, 3).permute(0, 2, 3, 1)
    return (level + pattern)[..., None] + tint + clutter


def _drifted(texture: Tensor, batch: Batch, fps: float) -> Tensor:
    """The background as a slowly drifting camera sees it: [B, T, FRAME, FRAME, 3]."""
    device, count = texture.device, len(texture)
    seconds = torch.arange(batch.num_frames, device=device) / fps
    offset = DRIFT + torch.round(batch.ground[:, 3:5, None] * seconds)  # [B, 2, T]
    offset = offset.clamp(0, 2 * DRIFT).long()
    axis = torch.arange(FRAME, device=device)
    xs, ys = (offset[:, :, :, None] + axis).unbind(1)  # [B, T, FRAME]
    rows = torch.arange(count, device=device)[:, None, None, None]
    return texture[rows, ys[..., :, None], xs[..., None, :]]


# ---------------------------------------------------------------------------------------------------------- objects


def _distances(u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Signed distances to each of SHAPES, negative inside, at (u, v) in units of the radius, v downwards."""
    x, y, length = u.abs(), v.abs(), torch.hypot(u, v)
    triangle = torch.maximum(0.866 * x - 0.5 * (v - 0.15), v - 0.15) - 0.55
    wedge = 2 * torch.pi / 5
    turn = torch.atan2(x, -v)  # from the upper tip
    turn = (turn - wedge * torch.round(turn / wedge)).abs()
    star = 0.350 * (length * torch.cos(turn) - 1) + 0.937 * length * torch.sin(turn)
    cross = torch.minimum(torch.maximum(x - 0.98, y - 0.33), torch.maximum(x - 0.33, y - 0.98))
    square, diamond = torch.maximum(x, y) - 0.82, (x + y - 1.1) * 0.707
    return length - 0.95, square, triangle, star, cross, (length - 0.72).abs() - 0.24, diamond


def _paint(digit: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Glyph values [B, T, W, W] of `digit` [B] at (u, v); units of the radius."""
    column, row = torch.floor(u / DOT + 3.5).long(), torch.floor(v / DOT + 4.5).long()
    inside = (column >= 0) & (column < 7) & (row >= 0) & (row < 9)
    glyphs = GLYPHS.to(u.device)
    return glyphs[digit[:, None, None, None], row.clamp(0, 8), column.clamp(0, 6)] * inside


def _draw(frames: Tensor, batch: Batch, n: int, palette: Tensor) -> None:
    """Draws the n-th object of every clip over `frames` [B, T, FRAME, FRAME, 3], in place."""
    count, num_frames = frames.shape[:2]
    centre, radius = batch.centre[:, n], batch.radius[:, n, None, None, None]  # [B, T, 2], [B, 1, 1, 1]
    origin = (centre.floor() - WINDOW // 2).clamp(0, FRAME - WINDOW)  # windows never leave the frame
    axis = torch.arange(WINDOW, device=frames.device)
    xs, ys = (origin[..., None] + axis).unbind(2)  # [B, T, W]
    u = ((xs + 0.5 - centre[..., :1])[..., None, :] / radius).expand(-1, -1, WINDOW, -1)
    v = ((ys + 0.5 - centre[..., 1:])[..., :, None] / radius).expand(-1, -1, -1, WINDOW)
    shape = batch.shape[:, n, None, None, None]
    distance = torch.full_like(u, 9.0)
    for index, candidate in enumerate(_distances(u, v)):
        distance = torch.where(shape == index, candidate, distance)
    alpha = (0.5 - distance * radius).clamp(0, 1) * batch.shown[:, n, :, None, None]  # one pixel of soft edge
    glyph = _paint(batch.digit[:, n], u, v)
    ink = palette[:, n, None, None, None] * (glyph == 0)[..., None] + (glyph == 2)[..., None]
    alpha = torch.maximum(alpha, (glyph > 0) * batch.shown[:, n, :, None, None])
    clip = torch.arange(count * num_frames, device=frames.device).view(count, num_frames, 1, 1)
    where = (clip * FRAME + ys.long()[..., :, None]) * FRAME + xs.long()[..., None, :]
    pixels = frames.view(-1, 3)
    pixels[where] = torch.lerp(pixels[where], ink.to(frames.dtype), alpha[..., None].to(frames.dtype))


def render(batch: Batch, fps: float = SAMPLED_FPS, generator: torch.Generator | None = None) -> Tensor:
    """Clean frames [B, T, FRAME, FRAME, 3] in [0, 1]; later objects lie in front of earlier ones."""
    frames = _drifted(_texture(batch, generator), batch, fps).contiguous()
    base = torch.tensor(list(COLOURS.values()), device=frames.device)[batch.colour]  # [B, N, 3]
    palette = base + 0.04 * torch.randn(base.shape, device=frames.device, generator=generator)
    for n in range(MAX_THINGS):
        _draw(frames, batch, n, palette.clamp(0, 1))
    return frames


def degrade(frames: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What a camera and a codec do: noise [B] on every clip; on half of them subsampled chroma and softened detail."""
    count = len(frames)
    draw = torch.rand(2, count, 1, 1, 1, 1, device=frames.device, generator=generator, dtype=frames.dtype)
    coded, soft = draw[0] < 0.5, draw[1] * 0.5
    luma = frames.mean(-1, keepdim=True)
    flat = (frames - luma).flatten(0, 1).permute(0, 3, 1, 2)
    chroma = F.interpolate(F.avg_pool2d(flat, 2), scale_factor=2.0).permute(0, 2, 3, 1).view_as(frames)
    blurred = F.avg_pool2d(luma.flatten(0, 1).squeeze(-1), 3, 1, 1, count_include_pad=False).view_as(luma)
    frames = torch.where(coded, torch.lerp(luma, blurred, soft.expand_as(luma)) + chroma, frames)
    grain = torch.randn(frames.shape, device=frames.device, generator=generator, dtype=frames.dtype)
    return (frames + grain * noise.view(-1, 1, 1, 1, 1).to(frames.dtype)).clamp(0, 1)


def patchify(frames: Tensor) -> Tensor:
    """Frames in [0, 1] as normalised patches [B * T/2 * 12 * 12, 1176] in the order of Qwen's video processor."""
    count, num_frames = frames.shape[:2]
    mean, std = (torch.tensor(value, device=frames.device, dtype=frames.dtype) for value in (IMAGE_MEAN, IMAGE_STD))
    frames = (frames - mean) / std
    grid = frames.view(count, num_frames // TEMPORAL, TEMPORAL, CELLS, MERGE, PATCH, CELLS, MERGE, PATCH, 3)
    return grid.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(-1, 3 * TEMPORAL * PATCH * PATCH)


def clip_pixels(batch: Batch, fps: float = SAMPLED_FPS, generator: torch.Generator | None = None) -> Tensor:
    """Degraded frames [B, T, FRAME, FRAME, 3] quantised to 256 levels, as floats in [0, 1]."""
    frames = degrade(render(batch, fps, generator), batch.noise, generator)
    return torch.round(frames * 255) / 255


def cell_labels(batch: Batch) -> dict[str, Tensor]:
    """What each visual token shows: class indices [B, T/2 * 36] by attribute, -100 where no object is.

    An object counts in a cell when its core (0.6 of its radius) reaches into it in one of the two frames; the front
    one wins. "colour" has one more class for no object. "rank" and "entry" need the frames before.
    """
    device = batch.centre.device
    middle = (torch.arange(CELLS, device=device) + 0.5) * CELL
    gap = (batch.centre[..., None] - middle).abs() - CELL / 2  # [B, N, T, 2, CELLS]
    across, down = gap.clamp(min=0).unbind(3)
    away = torch.hypot(down[..., :, None], across[..., None, :]).flatten(-2)  # [B, N, T, 36]
    hit = (away < 0.6 * batch.radius[..., None, None]) & batch.shown[..., None]
    hit = hit.unflatten(2, (-1, TEMPORAL)).any(3)  # [B, N, T/2, 36]
    rank = torch.arange(MAX_THINGS, device=device).expand_as(batch.shape)
    front = (hit * (rank[..., None, None] + 1)).amax(1).flatten(1) - 1  # [B, T/2 * 36], -1 for none
    classes = {name: getattr(batch, name) for name in ("colour", "shape", "digit", "motion", "entry")}
    classes |= {"size": (batch.radius > 15).long(), "rank": rank}
    labels = {
        name: torch.where(front < 0, -100, value.gather(1, front.clamp(min=0))) for name, value in classes.items()
    }
    labels["colour"] = torch.where(front < 0, len(COLOURS), labels["colour"])
    cell = torch.arange(front.shape[1], device=device).expand_as(front)
    return labels | {"row": cell // CELLS % CELLS, "column": cell % CELLS}


SEEN = {  # classes by attribute that two frames show
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES),
    "digit": NO_DIGIT + 1,
    "motion": 1 + 2 * len(DIRECTIONS),
    "size": 2,
    "row": CELLS,
    "column": CELLS,
}
REMEMBERED = {"rank": MAX_THINGS, "entry": len(ENTRIES)}  # classes by attribute that need the frames before
