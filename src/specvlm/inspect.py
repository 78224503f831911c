"""A picture of what pruning keeps: sampled frames with the kept visual tokens lit, and the target's attention below."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from specvlm import media, prune
from specvlm.config import EngineConfig
from specvlm.engine import SpecVLM
from specvlm.errors import ConfigError
from specvlm.media import Frames

MAX_STEPS = 16  # time steps drawn
TILE = 224  # pixels that a frame is wide or high, about
MARGIN, GAP, LINE = 24, 12, 20  # around the picture, between tiles, a line of text
BACKGROUND, INK, FAINT, ACCENT = (16, 18, 24), (236, 238, 242), (140, 146, 158), (255, 196, 60)
HEAT = ((0, 0, 4), (50, 10, 94), (120, 28, 109), (187, 55, 84), (237, 105, 37), (251, 180, 26), (252, 255, 164))

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True)
class Inspection:
    """What one request's pruning keeps of one video."""

    config: EngineConfig
    frames: Frames
    grid: Tensor  # [V, 3] int64: time step, row, column
    scores: Tensor  # [V] float32, the target's attention
    keep: Tensor  # [K] int64

    @property
    def shape(self) -> tuple[int, int, int]:
        """Time steps, rows and columns."""
        steps, rows, columns = (self.grid.amax(0) + 1).tolist()
        return steps, rows, columns

    @property
    def mass(self) -> float:
        """Share of the target's attention to the visual tokens that falls on the kept ones."""
        return float(self.scores[self.keep].sum() / self.scores.sum())

    def summary(self) -> str:
        """Return one line: pruner, kept of all, attention kept."""
        kept, total = len(self.keep), len(self.scores)
        return (
            f"{self.config.prune.pruner} keeps {kept} of {total} visual tokens ({kept / total:.1%}) "
            f"with {self.mass:.0%} of the attention"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain JSON types."""
        return {
            "pruner": self.config.prune.pruner,
            "visual_tokens": len(self.scores),
            "kept_visual_tokens": len(self.keep),
            "attention_kept": self.mass,
            "grid": dict(zip(("time", "rows", "columns"), self.shape, strict=True)),
            "keep": self.keep.tolist(),
        }

    def save(self, path: str) -> None:
        """Write the picture as a PNG, whole or not at all.

        Raises:
            ConfigError: the file cannot be written.
        """
        encoded = io.BytesIO()
        draw(self).save(encoded, "PNG")
        part = Path(f"{path}.{os.getpid()}.part")
        try:
            with part.open("xb") as file:
                file.write(encoded.getvalue())
            part.replace(path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise ConfigError(
                    f"output={path!r} cannot be written ({error.strerror or error}): give another file"
                ) from error
            raise


def inspect(
    model: SpecVLM,
    source: Any,
    prompt: str | None = None,
    *,
    watch: Callable[[str], None] = lambda name: None,
    **settings: Any,
) -> Inspection:
    """Prefill the target on a video and a question; return its attention and what the pruner keeps.

    Args:
        model: any; its draft is not used.
        source: what `media.load` reads.
        prompt: the question; None asks for a description.
        watch: observer of the stages.
        **settings: any field of the configs, as in `EngineConfig.replace`.
    """
    watch("read")
    request = model.request(source, prompt, **settings)
    frames = media.load(source, request.config.video)
    request.media = [("video", frames)]
    request.seconds.on_stage = watch
    start = model.prefill(request, is_scored=True)  # a pruner that reads no scores is shown with them too
    config = request.config
    keep = prune.select(start.scores, start.prompt.grid, start.prompt.visual_id, config.prune)
    return Inspection(config, frames, start.prompt.grid.cpu(), start.scores.cpu(), keep.cpu())


# Drawing


def draw(found: Inspection) -> Image.Image:
    """Return the contact sheet: for each drawn time step its frame, its heat map and a caption."""
    steps, rows, columns = found.shape
    shown = [place * steps // min(steps, MAX_STEPS) for place in range(min(steps, MAX_STEPS))]
    cell = max(2, round((TILE if len(shown) > 2 else 2 * TILE) / max(rows, columns)))
    width, height = columns * cell, rows * cell
    step_width, step_height = width + GAP, LINE + 2 * height + 4 + GAP
    across = _columns(len(shown), step_width, step_height)
    top, down = MARGIN + 3 * LINE, -(-len(shown) // across)
    title = _title(found, len(shown))
    full = 2 * MARGIN + max(across * step_width - GAP, title.width)
    sheet = Image.new("RGB", (full, top + down * step_height - GAP + MARGIN), BACKGROUND)
    sheet.paste(title, (MARGIN, MARGIN - 4))
    kept, heat = _cells(found)
    for place, step in enumerate(shown):
        x, y = MARGIN + place % across * step_width, top + place // across * step_height
        seconds, picture = _frame(found.frames, step, steps, (width, height))
        _write(sheet, (x, y), f"{seconds:.2f} s", f"{int(kept[step].sum())} kept", width)
        sheet.paste(_lit(picture, kept[step], cell), (x, y + LINE))
        sheet.paste(_heated(heat[step], cell), (x, y + LINE + height + 4))
    return sheet


def _columns(count: int, width: int, height: int) -> int:
    """Return how many tiles stand side by side: about 1.6 times as wide as high, with few empty places at the end."""
    ideal = math.sqrt(1.6 * count * height / width)
    near = [across for across in range(1, count + 1) if ideal / 1.6 <= across <= ideal * 1.6] or [count]
    return min(near, key=lambda across: (-count % across, abs(across - ideal)))


def _cells(found: Inspection) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return what is kept and the heat, 0 to 1, both [time steps, rows, columns]."""
    time, row, column = found.grid.unbind(1)
    kept = torch.zeros(found.shape, dtype=torch.bool)
    kept[time[found.keep], row[found.keep], column[found.keep]] = True
    heat = torch.zeros(found.shape)
    heat[time, row, column] = found.scores / _brightest(found)
    return kept.numpy(), heat.numpy()


def _brightest(found: Inspection) -> float:
    """Return the score that the brightest colour stands for: few tokens hold far more than all others."""
    return max(float(found.scores.quantile(0.99)), 1e-12)


def _frame(frames: Frames, step: int, steps: int, size: tuple[int, int]) -> tuple[float, Image.Image]:
    """Return the time and the picture of a time step's first frame (a step covers one frame or a few)."""
    first = step * -(-len(frames.pixels) // steps)
    picture = Image.fromarray(frames.pixels[first].permute(1, 2, 0).cpu().numpy())
    return float(frames.seconds[first]), picture.resize(size, Image.Resampling.LANCZOS)


def _lit(picture: Image.Image, kept: npt.NDArray[np.bool_], cell: int) -> Image.Image:
    """Return the picture with kept cells [rows, columns] as they are, outlined, and the others dim and grey."""
    dim = picture.convert("L").point(lambda value: 20 + value // 3).convert("RGB")
    mask = Image.fromarray(kept.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    lit = Image.composite(picture, dim, mask)
    if cell >= 8:
        _outline(ImageDraw.Draw(lit), kept, cell)
    return lit


def _outline(pen: ImageDraw.ImageDraw, kept: npt.NDArray[np.bool_], cell: int) -> None:
    """Draw a line just inside kept cells, where one borders on a cell that is not kept."""
    padded = np.pad(kept, 1)
    for row, column in np.argwhere(kept).tolist():
        left, top, right, bottom = column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1
        sides = {
            (0, 1): (left, top, right, top),
            (2, 1): (left, bottom, right, bottom),
            (1, 0): (left, top, left, bottom),
            (1, 2): (right, top, right, bottom),
        }
        for (down, across), line in sides.items():
            if not padded[row + down, column + across]:
                pen.line(line, ACCENT)


def _heated(heat: npt.NDArray[np.float32], cell: int) -> Image.Image:
    """Return the heat map of one time step, [rows, columns] from 0 to 1."""
    rows, columns = heat.shape
    return Image.fromarray(_colours(heat)).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)


def _colours(heat: npt.NDArray[np.float32]) -> Pixels:
    """Return the colour [..., 3] of each value from 0 to 1; small ones take up more of the colours."""
    places = np.linspace(0, 1, len(HEAT)) ** 1.5
    return np.stack([np.interp(heat, places, channel) for channel in zip(*HEAT, strict=True)], -1).astype(np.uint8)


def _title(found: Inspection, num_shown: int) -> Image.Image:
    """Return two lines: what is kept, and the scale of the heat maps."""
    large, small = ImageFont.load_default(20), ImageFont.load_default(13)
    share = _brightest(found) / float(found.scores.sum())
    left = f"{num_shown} of {found.shape[0]} time steps; kept cells are lit. Below: attention a token, 0"
    right = f"{share:.2%} of the attention or more"
    scale = round(small.getlength(left)) + 8
    end = scale + 96 + 8
    width = max(large.getlength(found.summary()), end + small.getlength(right))
    title = Image.new("RGB", (math.ceil(width), 48), BACKGROUND)
    pen = ImageDraw.Draw(title)
    pen.text((0, 0), found.summary(), INK, large)
    pen.text((0, 30), left, FAINT, small)
    title.paste(Image.fromarray(_colours(np.linspace(0, 1, 96, dtype=np.float32)[None].repeat(10, 0))), (scale, 34))
    pen.text((end, 30), right, FAINT, small)
    return title


def _write(sheet: Image.Image, corner: tuple[int, int], left: str, right: str, width: int) -> None:
    """Write a tile's caption: one text at its left edge and one at its right."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text(corner, left, INK, font)
    pen.text((corner[0] + width - pen.textlength(right, font), corner[1]), right, FAINT, font)
