"""A picture of what pruning keeps: sampled frames with the kept visual tokens lit, and the target's attention below."""

from __future__ import annotations

import io
import math
import os
import urllib.parse
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from specvlm import prune
from specvlm.core.config import EngineConfig
from specvlm.core.errors import ConfigError
from specvlm.engine.api import SpecVLM
from specvlm.families import last_words
from specvlm.media import Frames

MAX_STEPS = 16  # time steps drawn
PAGE = (1600, 1000)  # pixels that all tiles together are wide and high, at most
MIN_CELL = 2  # pixels of a cell, if the page must grow for it
MIN_WIDTH = 720  # of the page without its margins, for the title's sake
MARGIN, GAP, SEAM, LINE = 24, 12, 4, 20  # around the picture, between tiles, between frame and heat, a line of text
NAME_SIZE, PROMPT_SIZE, SMALL_SIZE = 24, 18, 14  # of letters
PROMPT_LINES = 3  # of the question, at most
MAX_LETTERS = 2000  # of a text, that are looked at to fill its lines
SCALE = (128, 12)  # of the colours' scale
BACKGROUND, INK, FAINT, ACCENT = (16, 18, 24), (236, 238, 242), (140, 146, 158), (255, 196, 60)
HEAT = ((0, 0, 4), (50, 10, 94), (120, 28, 109), (187, 55, 84), (237, 105, 37), (251, 180, 26), (252, 255, 164))
SYSTEM_FONTS = (  # for letters that Pillow's own font, a Latin one, lacks
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc",
    "Arial Unicode.ttf", "PingFang.ttc", "arial.ttf", "msyh.ttc", "meiryo.ttc", "malgun.ttf",
)  # fmt: skip
NO_LETTER = "\uffff"  # stands for no letter in any font, so it is drawn as what is missing

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Inspection:
    """What one request's pruning keeps of one video."""

    name: str  # of the video
    prompt: str
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
            "video": self.name,
            "prompt": self.prompt,
            "pruner": self.config.prune.pruner,
            "visual_tokens": len(self.scores),
            "kept_visual_tokens": len(self.keep),
            "attention_kept": self.mass,
            "grid": dict(zip(("time", "rows", "columns"), self.shape, strict=True)),
            "seconds": self.frames.seconds.tolist(),
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
        source: what `SpecVLM.request` takes.
        prompt: the question; None asks for a description.
        watch: observer of the stages.
        **settings: any field of the configs, as in `EngineConfig.replace`.
    """
    watch("read")
    request = model.load(source, prompt, **settings)
    found = request.loaded.media if request.loaded else ()
    if len(found) != 1:
        raise ConfigError(f"{len(found)} videos cannot be drawn at once: give one")
    (frames,) = found
    request.seconds.on_stage = watch
    start = model.prefill(request, is_scored=True)  # a pruner that reads no scores is shown with them too
    config = request.config
    keep = prune.select(start.scores, start.prompt.grid, start.prompt.visual_id, config.prune)
    name = _name(request.media[0].source) or f"{len(frames.seconds)} frames"
    return Inspection(
        name, last_words(request.messages), config, frames, start.prompt.grid.cpu(), start.scores.cpu(), keep.cpu()
    )


def _name(source: Any) -> str:
    """Return the file name of a path, URL or file object; "" for what has none."""
    path = getattr(source, "name", source)
    if not isinstance(path, str | os.PathLike) or str(path).startswith("data:"):
        return ""
    text = os.fsdecode(path)
    return Path(urllib.parse.urlsplit(text).path if "://" in text else text).name


# Drawing


def draw(found: Inspection) -> Image.Image:
    """Return the contact sheet: for each drawn time step its frame, its heat map and a caption."""
    steps, rows, columns = found.shape
    shown = [place * steps // min(steps, MAX_STEPS) for place in range(min(steps, MAX_STEPS))]
    layout = lay_out(len(shown), rows, columns)
    width = max(MIN_WIDTH, layout.width)
    title = _title(found, len(shown), layout, width)
    top = MARGIN + title.height + GAP
    sheet = Image.new("RGB", (width + 2 * MARGIN, top + layout.height + MARGIN), BACKGROUND)
    sheet.paste(title, (MARGIN, MARGIN))
    kept, heat = _cells(found)
    for place, step in enumerate(shown):
        tile = _tile(found, step, layout, kept[step], heat[step])
        x, y = layout.corner(place)
        sheet.paste(tile, (MARGIN + (width - layout.width) // 2 + x, top + y))
    return sheet


@dataclass(frozen=True)
class Layout:
    """Where what is drawn stands: tiles in rows, each a caption, a frame and its heat map; all in pixels.

    Args:
        count: tiles.
        grid: rows and columns of cells in a frame.
        cell: width and height of a cell.
        across: tiles in a row.
        is_beside: the heat map stands to the right of its frame, not below.
    """

    count: int
    grid: tuple[int, int]
    cell: int
    across: int
    is_beside: bool

    @property
    def frame(self) -> tuple[int, int]:
        """Width and height of a frame, and of its heat map."""
        rows, columns = self.grid
        return columns * self.cell, rows * self.cell

    @property
    def heat(self) -> tuple[int, int]:
        """Left upper corner of the heat map in its tile."""
        width, height = self.frame
        return (width + SEAM, LINE) if self.is_beside else (0, LINE + height + SEAM)

    @property
    def tile(self) -> tuple[int, int]:
        """Width and height of a tile."""
        return self.heat[0] + self.frame[0], self.heat[1] + self.frame[1]

    @property
    def down(self) -> int:
        """Rows of tiles."""
        return -(-self.count // self.across)

    @property
    def width(self) -> int:
        """Of all tiles together."""
        return self.across * (self.tile[0] + GAP) - GAP

    @property
    def height(self) -> int:
        """Of all tiles together."""
        return self.down * (self.tile[1] + GAP) - GAP

    def corner(self, place: int) -> tuple[int, int]:
        """Return the left upper corner of a tile, among all tiles."""
        width, height = self.tile
        return place % self.across * (width + GAP), place // self.across * (height + GAP)


def lay_out(count: int, rows: int, columns: int) -> Layout:
    """Return the layout of `count` frames of rows x columns cells that draws them largest on the page."""
    every = [
        Layout(count, (rows, columns), 0, across, is_beside)
        for is_beside in (False, True)
        for across in range(1, count + 1)
    ]
    best = max(every, key=lambda one: _room(one) * count / (one.across * one.down))  # empty places are lost
    return replace(best, cell=max(MIN_CELL, math.floor(_room(best))))


def _room(bare: Layout) -> float:
    """Return how large the page lets the cells of a layout be, given what of it is not cells."""
    rows, columns = bare.grid
    width = (PAGE[0] - bare.width) / (bare.across * columns * (2 if bare.is_beside else 1))
    height = (PAGE[1] - bare.height) / (bare.down * rows * (1 if bare.is_beside else 2))
    return min(width, height)


def _cells(found: Inspection) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return what is kept and the heat, 0 to 1, both [time steps, rows, columns]."""
    time, row, column = found.grid.unbind(1)
    kept = torch.zeros(found.shape, dtype=torch.bool)
    kept[time[found.keep], row[found.keep], column[found.keep]] = True
    low, high = scale(found)
    heat = torch.zeros(found.shape)
    heat[time, row, column] = ((found.scores - low) / max(high - low, 1e-12)).clamp(0, 1)
    return kept.numpy(), heat.numpy()


def scale(found: Inspection) -> tuple[float, float]:
    """Return the scores of the darkest and the brightest colour: the least one, and what few tokens exceed by far."""
    return float(found.scores.min()), float(found.scores.quantile(0.99))


def _tile(
    found: Inspection, step: int, layout: Layout, kept: npt.NDArray[np.bool_], heat: npt.NDArray[np.float32]
) -> Image.Image:
    """Return a time step's caption, frame and heat map; kept and heat are [rows, columns]."""
    tile = Image.new("RGB", layout.tile, BACKGROUND)
    seconds, picture = _frame(found.frames, step, found.shape[0], layout.frame)
    pen, font = ImageDraw.Draw(tile), _own_font(SMALL_SIZE)
    count = f"{int(kept.sum())} kept"
    pen.text((0, 0), f"{seconds:.2f} s", INK, font)
    pen.text((layout.frame[0] - pen.textlength(count, font), 0), count, FAINT, font)
    tile.paste(_lit(picture, kept, layout.cell), (0, LINE))
    tile.paste(_heated(heat, layout.cell), layout.heat)
    return tile


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


# Words


def _title(found: Inspection, num_shown: int, layout: Layout, width: int) -> Image.Image:
    """Return the video's name, the question, what is kept, and the scale of the heat maps."""
    lines = [(text, font, INK) for text, font in _headings(found, width)]
    small = _own_font(SMALL_SIZE)
    lines.append((f"{found.summary()}; kept cells are lit.", small, INK))
    title = Image.new("RGB", (width, sum(_height(font) for _, font, _ in lines) + LINE), BACKGROUND)
    pen, y = ImageDraw.Draw(title), 0
    for text, font, colour in lines:
        pen.text((0, y), text, colour, font)
        y += _height(font)
    _draw_scale(title, y, _scale_texts(found, num_shown, layout))
    return title


def _headings(found: Inspection, width: int) -> Iterator[tuple[str, Font]]:
    """Yield the lines that name video and question, each with its font."""
    for text, size, most in ((found.name, NAME_SIZE, 1), (f"\u201c{found.prompt}\u201d", PROMPT_SIZE, PROMPT_LINES)):
        letters = " ".join(text.split())[:MAX_LETTERS]
        font = _font(letters, size)
        for line in _wrapped(_drawable(letters, font), font, width, most):
            yield line, font


def _height(font: Font) -> int:
    return round(1.5 * font.size)


def _own_font(size: int) -> Font:
    """Return the font that comes with Pillow."""
    return cast(Font, ImageFont.load_default(size))


def _font(text: str, size: int) -> Font:
    """Return the first font that has most letters of a text."""
    fonts: list[Font] = [_own_font(size)]
    for name in SYSTEM_FONTS if _missing(text, fonts[0]) else ():
        with suppress(OSError):  # it is not on this machine
            fonts.append(ImageFont.truetype(name, size))
    return min(fonts, key=lambda font: len(_missing(text, font)))


def _missing(text: str, font: Font) -> set[str]:
    """Return the letters that a font does not have."""
    none = bytes(font.getmask(NO_LETTER))
    return {letter for letter in set(text) if not letter.isspace() and bytes(font.getmask(letter)) == none}


def _drawable(text: str, font: Font) -> str:
    """Return a text with letters that the font lacks, or that cannot be drawn, as escapes."""
    missing = _missing(text, font)
    return "".join(letter.encode("ascii", "backslashreplace").decode() if letter in missing else letter
                   for letter in text)  # fmt: skip


def _wrapped(text: str, font: Font, width: int, most: int) -> Iterator[str]:
    """Yield the lines of a text, at most so many; what is left out is an ellipsis."""
    for number in range(1, most + 1):
        fitting = -1 + bisect_right(
            range(len(text) + 1), width, key=lambda count: math.ceil(font.getlength(text[:count]))
        )
        if fitting == len(text):
            yield text
            return
        if number == most:
            yield f"{text[: max(1, fitting - 2)].rstrip()}\u2026"
            return
        end = text.rfind(" ", 1, fitting + 1)
        end = end if end > 0 else max(1, fitting)
        yield text[:end]
        text = text[end:].lstrip()


def _scale_texts(found: Inspection, num_shown: int, layout: Layout) -> tuple[str, str]:
    """Return what stands left and right of the scale."""
    total = float(found.scores.sum())
    low, high = (f"{score / total:.2%}" for score in scale(found))
    where = "To the right" if layout.is_beside else "Below"
    steps = f"{num_shown} of {found.shape[0]} time step{'s' * (found.shape[0] != 1)}"
    left = f"{steps}. {where}: a token's share of the attention, from {low}"
    return left, f"to {high} or more"


def _draw_scale(title: Image.Image, y: int, texts: tuple[str, str]) -> None:
    """Draw the colours from the least to the largest between two texts."""
    pen, font = ImageDraw.Draw(title), _own_font(SMALL_SIZE)
    x = round(font.getlength(texts[0])) + 8
    ramp = np.linspace(0, 1, SCALE[0], dtype=np.float32)[None].repeat(SCALE[1], 0)
    pen.text((0, y), texts[0], FAINT, font)
    title.paste(Image.fromarray(_colours(ramp)), (x, y + 3))
    pen.text((x + SCALE[0] + 8, y), texts[1], FAINT, font)
