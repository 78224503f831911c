"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense): patches on a native-resolution grid, M-RoPE positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from specvlm.core.config import TEXT_POSITIONS, shown
from specvlm.core.errors import ConfigError, UnsupportedModel
from specvlm.families import qwen_tower as vision
from specvlm.families.base import Features, Inputs, VideoShape, Visual, counting, family
from specvlm.families.common import Encoded, VisionFamily, cells
from specvlm.families.messages import Message
from specvlm.families.pixels import (
    HALF,
    PROCESSOR_FILES,
    Budget,
    Limits,
    exact_size,
    fit,
    normalize,
    pad_frames,
    patchify,
    processor_settings,
    resize,
    video_processor,
)
from specvlm.media import Frames

# What the HF processor classes assume where a checkpoint's files are silent.
_IMAGE_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "min_pixels": None,
    "max_pixels": None,
}
_VIDEO_DEFAULTS: dict[str, Any] = _IMAGE_DEFAULTS | {
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "cap_pixels_per_frame": False,
    "max_video_tokens": 128000,
}
_QWEN3_VIDEO_DEFAULTS: dict[str, Any] = _VIDEO_DEFAULTS | {
    "patch_size": 16,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "image_mean": HALF,
    "image_std": HALF,
    "max_video_tokens": 768,
}


_MOST_CELLS = 16  # visual tokens along a side of a frame that is made up: 256 a time step
_LEAST_STEPS = 4  # of a video that is made up
_NO_LIMIT = 1 << 40  # pixels
_TOWER_INPUTS = (
    ("image", "pixel_values", "image_grid_thw"),
    ("video", "pixel_values_videos", "video_grid_thw"),
)


def mrope_positions(num_tokens: int, places: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Return the positions [3, num_tokens] of a prompt as the Qwen models were trained.

    Text counts up in all three axes; a block of visual tokens adds its cells to where it begins; what follows begins at
    one more than the largest position before it, time included.

    Args:
        num_tokens: of the prompt.
        places: [V] int64, ascending places of the visual tokens in it.
        blocks: cells (time, row, column) [n, 3] int64 of every run of visual tokens in a row, V in all.
    """
    pieces, end, start = [], 0, 0  # end: tokens done; start: the next one's position
    ends = [0, *torch.tensor([len(block) for block in blocks]).cumsum(0).tolist()]
    firsts = places[ends[:-1]].tolist()
    for first, block in zip(firsts, blocks, strict=True):
        pieces.append(torch.arange(start, start + first - end).expand(3, -1))
        start += first - end
        pieces.append(block.T + start)
        start, end = int(pieces[-1].max()) + 1, first + len(block)
    pieces.append(torch.arange(start, start + num_tokens - end).expand(3, -1))
    return torch.cat(pieces, 1)


def _split(sizes: Sequence[int], rows: Tensor, *deepstack: Tensor) -> Iterator[Features]:
    """Yield the features of visuals one after another."""
    layers = zip(*(torch.split(layer, list(sizes)) for layer in deepstack), strict=True) if deepstack else repeat(())
    for mine, deep in zip(torch.split(rows, list(sizes)), layers, strict=False):
        yield Features(mine, tuple(deep))


# By the class of a video processor; Qwen3-VL's has one pixel budget for all frames, Qwen2-VL's one for each.
_DEFAULTS_OF = {"Qwen2VLVideoProcessor": _VIDEO_DEFAULTS, "Qwen3VLVideoProcessor": _QWEN3_VIDEO_DEFAULTS}


def _with_bounds(directory: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose `size` holds the least and most pixels, whichever way the checkpoint spells them.

    Raises:
        UnsupportedModel: one of them is missing.
    """
    size = dict(settings["size"])
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = settings[name] or size.get(edge) or size.get(name)
        if not isinstance(value, int | float) or value <= 0:
            problem = f"{directory}: size={settings['size']} of its processor has no {edge} (a number of pixels)"
            raise UnsupportedModel(f"{problem}: give both shortest_edge and longest_edge")
        size[edge] = int(value)
    return settings | {"size": size}


def _check_cells(directory: str, kind: str, settings: dict[str, Any], vision: Any) -> None:
    """Refuse a processor that cuts other patches than the vision tower takes.

    Raises:
        UnsupportedModel: the first setting that differs is named.
    """
    names = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    for ours, theirs in names.items():
        wanted = getattr(vision, theirs, settings[ours])
        if settings[ours] != wanted:
            problem = f"{directory}: {ours}={settings[ours]} of its {kind} processor does not fit the model's"
            raise UnsupportedModel(f"{problem} {theirs}={wanted}: take the processor that it was trained with")


def _trained_positions(directory: str, config: Any) -> str:
    """Return how the text behind a video was counted in training, as a checkpoint's config says; see VideoConfig.

    Raises:
        UnsupportedModel: it says neither.
    """
    found = getattr(config, "text_positions", "qwen")
    if found not in TEXT_POSITIONS[1:]:
        problem = f"{directory}: text_positions={shown(found)} in its config.json is not known"
        raise UnsupportedModel(f"{problem}: qwen or transformers, or leave it out")
    return str(found)


@family("qwen2_vl", "qwen2_5_vl")
class QwenVL(VisionFamily):
    """Qwen2-VL and Qwen2.5-VL: every frame has its own pixel budget; Qwen2.5-VL's positions count seconds."""

    is_mrope = True
    video_processor: ClassVar[str] = "Qwen2VLVideoProcessor"  # where the checkpoint's files name none

    def __init__(self, directory: str, config: Any, tokenizer: Any) -> None:
        super().__init__(directory, config, tokenizer)
        is_timed = config.model_type == "qwen2_5_vl"
        self.trained_positions = _trained_positions(directory, config)
        self._tokens_per_second = float(config.vision_config.tokens_per_second) if is_timed else None
        name = video_processor(directory, self.video_processor, _DEFAULTS_OF)
        self._is_budget_shared = name == "Qwen3VLVideoProcessor"
        self._processors = {
            kind: _with_bounds(directory, processor_settings(directory, kind, defaults))
            for kind, defaults in (("image", _IMAGE_DEFAULTS), ("video", _DEFAULTS_OF[name]))
        }
        for kind, settings in self._processors.items():
            _check_cells(directory, kind, settings, config.vision_config)
        self.settings |= self._processors

    @classmethod
    def video_shape(cls, config: Any, visual_tokens: int) -> VideoShape:
        """Return the frames of about so many visual tokens: up to 16 x 16 of them a time step, of two frames each."""
        vision = config.vision_config
        cells = max(1, min(_MOST_CELLS, math.isqrt(visual_tokens // _LEAST_STEPS)))
        steps = max(1, round(visual_tokens / cells**2))
        side = cells * vision.patch_size * vision.spatial_merge_size
        return VideoShape(side, steps * int(vision.temporal_patch_size), steps * cells**2)

    @classmethod
    def processor_files(cls, config: Any) -> dict[str, dict[str, Any]]:
        """Return processor files that fit a HF config; see Family."""
        vision = config.vision_config
        cell = vision.patch_size * vision.spatial_merge_size
        settings = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            "size": {"shortest_edge": cell * cell, "longest_edge": _NO_LIMIT},
        }
        return dict.fromkeys(PROCESSOR_FILES, settings)

    def prepare(self, model: Any) -> None:
        """Serve a loaded HF model; see VisionFamily."""
        super().prepare(model)
        vision.install(model.model.visual)

    def _encode(self, media: Sequence[Frames], limits: Sequence[Limits], device: torch.device | str) -> list[Encoded]:
        return [self._encode_one(frames, bounds, device) for frames, bounds in zip(media, limits, strict=True)]

    def _encode_one(self, frames: Frames, limits: Limits, device: torch.device | str) -> Encoded:
        settings = self._processors[frames.kind]
        temporal, merge = settings["temporal_patch_size"], settings["merge_size"]
        pixels = frames.pixels
        if settings["do_resize"]:
            pixels = resize(pixels, self._size(frames, limits), settings["resample"], device)
        elif limits.first is not None:
            problem = f"{limits.first} is not allowed: this checkpoint says not to resize (do_resize is false)"
            raise ConfigError(f"{problem}: leave it out")
        padded = pad_frames(pixels.to(device), temporal)
        patches, (steps, rows, columns) = patchify(padded, settings["patch_size"], temporal, merge)
        visual = Visual(frames.kind, (steps, rows // merge, columns // merge))
        text, runs = self._runs(frames, visual)
        seconds = temporal / frames.fps if frames.kind == "video" else None  # of one time step
        patches = normalize(patches, settings, 1, self.pixel_dtype).flatten(1)
        return Encoded(visual, patches, text, runs, seconds, math.prod(pixels.shape[2:]))

    def _size(self, frames: Frames, limits: Limits) -> tuple[int, int]:
        """Return the (height, width) that frames are resized to."""
        if limits.exact is None:
            return fit(frames.pixels.shape[2], frames.pixels.shape[3], self._budget(frames, limits))
        settings = self._processors[frames.kind]
        return exact_size(limits.exact, settings["patch_size"] * settings["merge_size"])

    def _budget(self, frames: Frames, limits: Limits) -> Budget:
        """Return the bounds on a resized image, or on one or all frames of a video."""
        settings = self._processors[frames.kind]
        cell = settings["patch_size"] * settings["merge_size"]
        if frames.kind == "image":
            budget = Budget(cell, settings["size"]["shortest_edge"], settings["size"]["longest_edge"])
            limits = replace(limits, total_pixels=None)
        else:
            budget = self._video_budget(cell, len(frames.pixels))
        return budget.lowered(limits.per_frame(len(frames.pixels), cell * cell)).raised(limits.min_pixels)

    def _video_budget(self, cell: int, num_frames: int) -> Budget:
        """Return the checkpoint's bounds on one frame of a video, or on all of them together."""
        settings = self._processors["video"]
        temporal, most = settings["temporal_patch_size"], settings["max_video_tokens"] * cell * cell
        low, high = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        is_capped = settings["cap_pixels_per_frame"]
        if self._is_budget_shared:
            if is_capped:
                high = max(min(most, high // num_frames), int(low * 1.05)) * num_frames
            padded = max(temporal, round(num_frames / temporal) * temporal)
            return Budget(cell, low, high, num_frames, padded, grows=True)
        if is_capped:
            high = max(min(high, int(most * 0.9) * temporal // num_frames), int(low * 1.05))
        return Budget(cell, low, high)

    def _runs(self, frames: Frames, visual: Visual) -> tuple[str, tuple[int, ...]]:
        """Return the text that stands for a visual and the number of tokens of each placeholder in it."""
        return self._tokens[visual.kind], (math.prod(visual.grid),)

    def _model_kwargs(self, kind: str, encoded: Sequence[Encoded]) -> dict[str, Any]:
        merge = self._processors[kind]["merge_size"]
        pixels = encoded[0].pixels if len(encoded) == 1 else torch.cat([e.pixels for e in encoded])
        grids = [(e.visual.grid[0], e.visual.grid[1] * merge, e.visual.grid[2] * merge) for e in encoded]
        grid_thw = torch.tensor(grids, device=pixels.device)
        if kind == "image":
            return {"pixel_values": pixels, "image_grid_thw": grid_thw}
        kwargs: dict[str, Any] = {"pixel_values_videos": pixels, "video_grid_thw": grid_thw}
        if self._tokens_per_second is not None:
            kwargs["second_per_grid_ts"] = torch.tensor(
                [e.extra for e in encoded], dtype=torch.float32, device=pixels.device
            )
        return kwargs

    def _layouts(self, inputs: Inputs) -> list[Tensor]:
        return [cells(*visual.grid) for visual in inputs.visuals]

    @torch.no_grad()
    def encode_visual(self, model: Any, inputs: Inputs) -> tuple[Features, ...]:
        """Run the vision tower, all images at once and all videos at once; see Family."""
        tower, kwargs = model.model.visual, inputs.to(model.device).model_kwargs
        found: dict[str, Iterator[Features]] = {}
        for kind, pixels, grid in _TOWER_INPUTS:
            if pixels in kwargs:
                out = tower(kwargs[pixels].type(tower.dtype), grid_thw=kwargs[grid])
                sizes = [math.prod(visual.grid) for visual in inputs.visuals if visual.kind == kind]
                found[kind] = _split(sizes, out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))
        return tuple(next(found[visual.kind]) for visual in inputs.visuals)

    @torch.no_grad()
    def positions(self, model: Any, inputs: Inputs) -> Tensor:
        """Return the positions [3, 1, S] of all tokens, on the device of the ids.

        "qwen": text goes on at one more than the largest position of all three axes, as transformers up to 4.57, vLLM
        and Qwen's own code count, with which Qwen's weights were trained. "transformers": as the installed version
        counts; from 5.0 on it leaves time out.
        """
        if counting(self, inputs) == "transformers" and inputs.visuals:
            known = {key: value for key, value in inputs.model_kwargs.items() if not key.startswith("pixel_values")}
            found: Tensor = model.model.get_rope_index(inputs.input_ids[None], **known)[0]
            return found
        ids = inputs.input_ids
        places = self._type_ids(ids).nonzero().squeeze(1).cpu()
        return mrope_positions(ids.shape[0], places, self._blocks(inputs))[:, None].to(ids.device)

    def _blocks(self, inputs: Inputs) -> list[Tensor]:
        """Return the cells [n, 3] of each run of visual tokens in a row, time as the model counts it."""
        seconds = iter(torch.as_tensor(inputs.model_kwargs.get("second_per_grid_ts", ())).tolist())
        blocks = []
        for visual in inputs.visuals:
            block = cells(*visual.grid)
            if visual.kind == "video" and self._tokens_per_second is not None:
                times = block[:, 0].to(torch.float32) * next(seconds, 1.0) * self._tokens_per_second
                block = torch.cat([times.long()[:, None], block[:, 1:]], 1)
            blocks.append(block)
        return blocks


@family("qwen3_vl")
class Qwen3VL(QwenVL):
    """Qwen3-VL: one pixel budget for all frames of a video, and each time step's seconds written before it.

    A video is `<0.5 seconds><|vision_start|>...<|vision_end|>` a time step, in place of the chat template's own start
    and end marker, as the model was released with. transformers 5.17 to 5.24 leave the template's pair around the
    whole (vllm-project/vllm#46817); pixels, grids and everything else are equal to theirs.
    """

    text_model_type = "qwen3"
    video_processor = "Qwen3VLVideoProcessor"

    def __init__(self, directory: str, config: Any, tokenizer: Any) -> None:
        super().__init__(directory, config, tokenizer)
        start, end = tokenizer.convert_ids_to_tokens([config.vision_start_token_id, config.vision_end_token_id])
        self._step = f"{start}{self._tokens['video']}{end}"

    def _render(self, messages: Sequence[Message]) -> str:
        return super()._render(messages).replace(self._step, self._tokens["video"])

    def _encode_one(self, frames: Frames, limits: Limits, device: torch.device | str) -> Encoded:
        if frames.kind == "video":  # HF refuses a video of fewer frames than one time step; here it is padded
            least = self._processors["video"]["temporal_patch_size"]
            if len(frames.pixels) < least:
                pixels, seconds = pad_frames(frames.pixels, least), pad_frames(frames.seconds, least)
                frames = replace(frames, pixels=pixels, seconds=seconds)
        return super()._encode_one(frames, limits, device)

    def _runs(self, frames: Frames, visual: Visual) -> tuple[str, tuple[int, ...]]:
        if visual.kind == "image":
            return super()._runs(frames, visual)
        steps, rows, columns = visual.grid
        temporal = self._processors["video"]["temporal_patch_size"]
        seconds = pad_frames(frames.seconds.double(), temporal).view(steps, temporal)
        middles = ((seconds[:, 0] + seconds[:, -1]) / 2).tolist()
        return "".join(f"<{middle:.1f} seconds>{self._step}" for middle in middles), (rows * columns,) * steps

    def _blocks(self, inputs: Inputs) -> list[Tensor]:
        """Return the cells [n, 3] of each run: every time step of a video is one by itself, so time never counts on."""
        blocks = []
        for visual in inputs.visuals:
            steps, rows, columns = visual.grid
            blocks += [cells(1, rows, columns)] * steps
        return blocks
