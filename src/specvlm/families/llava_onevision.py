"""LLaVA-OneVision: frames of a fixed size, pooled; one image in tiles, several images one tile each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specvlm.core.errors import ConfigError, UnsupportedModel
from specvlm.families import qwen_tower as vision
from specvlm.families.base import Features, Inputs, VideoShape, Visual, family
from specvlm.families.common import Encoded, VisionFamily, cells
from specvlm.families.pixels import PROCESSOR_FILES, Limits, normalize, processor_settings, resize
from specvlm.media import Frames

_DEFAULTS: dict[str, Any] = {"size": {"height": 384, "width": 384}, "do_center_crop": False}
_SHRINK_ABOVE = 1.1  # the model shrinks tiles whose side exceeds its bound by more than this
_NEWLINE = (-1, -1, -1)


def best_pinpoint(height: int, width: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the (height, width) of tiles that keeps most of an image's pixels, and then wastes the fewest."""

    def rank(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=rank)
    return best[0], best[1]


@family("llava_onevision")
class LlavaOnevision(VisionFamily):
    """LLaVA-OneVision with a SigLIP tower, whose features all become tokens.

    An image alone is cut into tiles (its high-resolution view) beside the whole image (the base view): the base view
    is time step 0 of its grid and the tiles are time step 1, so Visual.grid bounds both.
    """

    is_mrope = False

    def __init__(self, directory: str, config: Any, tokenizer: Any) -> None:
        super().__init__(directory, config, tokenizer)
        if config.vision_feature_select_strategy != "full":
            strategy = config.vision_feature_select_strategy
            raise UnsupportedModel(f"{directory}: vision_feature_select_strategy={strategy!r} is not 'full'")
        self._side = config.vision_config.image_size // config.vision_config.patch_size  # features a side of a tile
        self._pooled = math.ceil(self._side / 2)  # of a video's frame
        self._tile = int(config.vision_config.image_size)
        self._pinpoints = [tuple(pinpoint) for pinpoint in config.image_grid_pinpoints]
        self._max_tiles = int(re.sub(r"\D", "", config.vision_aspect_ratio))
        self._processors = {kind: processor_settings(directory, kind, _DEFAULTS) for kind in ("image", "video")}
        for settings in self._processors.values():
            if settings["do_center_crop"] or settings["size"] != {"height": self._tile, "width": self._tile}:
                raise UnsupportedModel(
                    f"{directory}: size={settings['size']} with do_center_crop={settings['do_center_crop']} is not "
                    f"supported: only {self._tile} x {self._tile} without cropping"
                )
        layout = {"side": self._side, "pinpoints": self._pinpoints, "max_tiles": self._max_tiles}
        self.settings |= self._processors | layout

    @classmethod
    def video_shape(cls, config: Any, visual_tokens: int) -> VideoShape:
        """Return the frames of about so many visual tokens: a tile each, and a newline behind the last."""
        side = int(config.vision_config.image_size)
        tokens = math.ceil(side // config.vision_config.patch_size / 2) ** 2
        count = max(1, round((visual_tokens - 1) / tokens))
        return VideoShape(side, count, count * tokens + 1)

    @classmethod
    def processor_files(cls, config: Any) -> dict[str, dict[str, Any]]:
        """Return processor files that fit a HF config; see Family."""
        side = int(config.vision_config.image_size)
        return {name: {"size": {"height": side, "width": side}} for name in PROCESSOR_FILES}

    def _encode(self, media: Sequence[Frames], limits: Sequence[Limits], device: torch.device | str) -> list[Encoded]:
        is_alone = sum(frames.kind == "image" for frames in media) == 1
        encoded = []
        for frames, bounds in zip(media, limits, strict=True):
            if bounds.exact is not None or bounds.min_pixels is not None:
                problem = f"{replace(bounds, max_pixels=None, total_pixels=None).first} is not allowed for this model"
                raise ConfigError(f"{problem}: its frames and tiles are all {self._tile} x {self._tile}; leave it out")
            most = bounds.per_frame(len(frames.pixels), self._tile**2)
            if frames.kind == "video":
                encoded.append(self._video(frames, device))
            else:
                encoded.append(self._image(frames.pixels.to(device), is_alone, most))
        return encoded

    def _video(self, frames: Frames, device: torch.device | str) -> Encoded:
        settings = self._processors["video"]
        pixels = frames.pixels
        if settings["do_resize"]:
            pixels = resize(pixels, (self._tile, self._tile), settings["resample"], device)
        pixels = normalize(pixels.to(device), settings, 1, self.pixel_dtype)
        visual = Visual("video", (len(pixels), self._pooled, self._pooled))
        return Encoded(visual, pixels, self._tokens["video"], (math.prod(visual.grid) + 1,), None, self._tile**2)

    def _image(self, image: Tensor, is_alone: bool, most: int | None) -> Encoded:
        """Encode one image [1, 3, H, W], first shrunk to at most `most` pixels."""
        settings = self._processors["image"]
        height, width = image.shape[-2:]
        if most is not None and height * width > most:
            shrink = math.sqrt(most / (height * width))
            height, width = max(1, int(height * shrink)), max(1, int(width * shrink))
            image = resize(image, (height, width), settings["resample"], image.device)
        tiles = self._tiles(image) if is_alone else self._square(image)
        pixels = normalize(tiles, settings, 1, self.pixel_dtype)
        layout = self._image_layout(height, width, is_alone)
        bounds = (layout.amax(0) + 1).tolist()
        visual = Visual("image", (bounds[0], bounds[1], bounds[2]))
        return Encoded(visual, pixels, self._tokens["image"], (len(layout),), (height, width), height * width)

    def _tiles(self, image: Tensor) -> Tensor:
        """Return [1 + tiles, 3, H, W] uint8: the whole image, then its tiles in reading order, black where it ends."""
        height, width = image.shape[-2:]
        rows, columns = best_pinpoint(height, width, self._pinpoints)
        by_width, by_height = columns / width, rows / height
        if by_width < by_height:
            size = min(math.ceil(height * by_width), rows), columns
        else:
            size = rows, min(math.ceil(width * by_height), columns)
        resample, device = self._processors["image"]["resample"], image.device
        fitted = resize(image, size, resample, device)
        left, top = (columns - size[1]) // 2, (rows - size[0]) // 2
        padded = F.pad(fitted, (left, columns - size[1] - left, top, rows - size[0] - top))
        cut = padded.view(3, rows // self._tile, self._tile, columns // self._tile, self._tile)
        tiles = cut.permute(1, 3, 0, 2, 4).reshape(-1, 3, self._tile, self._tile)
        return torch.cat([resize(image, (self._tile, self._tile), resample, device), tiles])

    def _square(self, image: Tensor) -> Tensor:
        """Return [1, 3, H, W] uint8: the image padded to a square with the mean colour, then resized."""
        settings = self._processors["image"]
        height, width = image.shape[-2:]
        side = max(height, width)
        colour = torch.tensor([int(mean * 255) for mean in settings["image_mean"]], dtype=torch.uint8)
        square = colour.to(image.device).view(1, 3, 1, 1).repeat(1, 1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[:, :, top : top + height, left : left + width] = image
        if not settings["do_resize"]:
            return square
        return resize(square, (self._tile, self._tile), settings["resample"], image.device)

    def _image_layout(self, height: int, width: int, is_alone: bool) -> Tensor:
        """Return the cells [n, 3] of an image's tokens; a newline ends each row of tiles, or the one tile."""
        newline = torch.tensor(_NEWLINE)
        base = cells(1, self._side, self._side)
        if not is_alone:
            return torch.cat([base, newline[None]])
        rows, columns = self._tile_grid(height, width)
        lines = cells(1, rows, columns, first_time=1).view(rows, columns, 3)
        return torch.cat([base, torch.cat([lines, newline.expand(rows, 1, 3)], 1).view(-1, 3)])

    def _tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of features that the tiles of a height x width image have, without their padding."""
        best = best_pinpoint(height, width, self._pinpoints)
        rows, columns = (self._side * (length // self._tile) for length in best)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        shrink = math.sqrt(rows * columns / (self._max_tiles * self._side**2))
        return (int(rows // shrink), int(columns // shrink)) if shrink > _SHRINK_ABOVE else (rows, columns)

    def _model_kwargs(self, kind: str, encoded: Sequence[Encoded]) -> dict[str, Any]:
        if kind == "video":
            videos = [e.pixels for e in encoded]
            same = len({len(video) for video in videos}) == 1
            return {"pixel_values_videos": _stacked(videos) if same else videos}
        pixels = _stacked([e.pixels for e in encoded])
        sizes = torch.tensor([e.extra for e in encoded], device=pixels.device)
        count = torch.tensor([len(encoded)], device=pixels.device)
        return {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": count}

    def _layouts(self, inputs: Inputs) -> list[Tensor]:
        sizes = iter(torch.as_tensor(inputs.model_kwargs.get("image_sizes", ())).tolist())
        is_alone = sum(visual.kind == "image" for visual in inputs.visuals) == 1
        newline = torch.tensor([_NEWLINE])
        layouts = []
        for visual in inputs.visuals:
            if visual.kind == "video":
                layouts.append(torch.cat([cells(*visual.grid), newline]))
            else:
                height, width = next(sizes)
                layouts.append(self._image_layout(height, width, is_alone))
        return layouts

    @torch.no_grad()
    def encode_visual(self, model: Any, inputs: Inputs) -> tuple[Features, ...]:
        """Run the vision tower in batches of frames; see Family. HF's own takes all, and videos of one length only."""
        kwargs = inputs.to(model.device).model_kwargs
        most = max(1, vision.MAX_PATCHES // self._side**2)
        found = {
            "image": self._image_features(model.model, kwargs, most),
            "video": self._video_features(model.model, kwargs.get("pixel_values_videos", ()), most),
        }
        return tuple(next(found[visual.kind]) for visual in inputs.visuals)

    def _image_features(self, model: Any, kwargs: dict[str, Any], most: int) -> Iterator[Features]:
        """Encode at most `most` images at a time; an image alone, in tiles, is never cut."""
        if "pixel_values" not in kwargs:
            return
        count = {"batch_num_images": kwargs["batch_num_images"]}
        for pixels, sizes in zip(
            *(torch.split(kwargs[key], most) for key in ("pixel_values", "image_sizes")), strict=True
        ):
            for rows in model.get_image_features(pixels, sizes, **count, return_dict=True).pooler_output:
                yield Features(rows)

    def _video_features(self, model: Any, videos: Sequence[Tensor] | Tensor, most: int) -> Iterator[Features]:
        """Encode videos [frames, 3, H, W] together where they are few and of one length, else in batches of frames."""
        if isinstance(videos, Tensor) and math.prod(videos.shape[:2]) <= most:
            batches: Iterable[list[Tensor]] = [[videos]]
        else:
            batches = ([part[None] for part in torch.split(video, most)] for video in videos)
        for batch in batches:
            # transformers up to 5.17 leaves the newline that ends a video to the caller, 5.24 adds it
            parts = [
                model.get_video_features(frames, return_dict=True).pooler_output[:, : frames.shape[1] * self._pooled**2]
                for frames in batch
            ]
            for rows in torch.cat(parts, 1):
                yield Features(torch.cat([rows, model.image_newline[None].to(rows)]))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of equal shape as one; one alone is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
