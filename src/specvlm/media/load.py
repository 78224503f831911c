"""The only entry to reading media: `load`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from specvlm.core.config import VideoConfig
from specvlm.core.errors import ConfigError, MediaError
from specvlm.media.content import is_still
from specvlm.media.fetch import located
from specvlm.media.frames import Frames, Source, check_size, from_array, from_frames, still, untimed
from specvlm.media.image import read_image, rgb_of
from specvlm.media.reader import read_video


def load(source: Source, config: VideoConfig, *, kind: str = "video") -> Frames:
    """Read a video, or one image, into memory as RGB frames of full size.

    Args:
        source: a path, a file:, http(s): or data: URL, bytes or a binary file object holding an encoded file; a uint8
            array or tensor of raw frames; a PIL image; a list of images (each in any of these forms); or Frames.
            An array of 4 axes is [T, H, W, 3] if its last axis is 3, else [T, 3, H, W]; one of 3 axes is an image.
        config: which frames. A file gives the frame on screen at each wanted time: start + i / fps, or num_frames
            evenly spread over [start, end), each another frame if the file has that many. fps above the file's own
            rate gives every frame once. Arrays and lists have no times: their frames are taken to be sampled at
            config.fps (default 2), and num_frames and max_frames thin them out. Frames are thinned out by their times.
        kind: "video" or "image"; a still picture read as a video has one frame.

    Returns:
        Frames with seconds counted from the file's first frame. Display rotation (and an image's EXIF orientation) is
        applied; the sample aspect ratio is not. The alpha of an image is composited on white, a video's is dropped.

    Raises:
        MediaError: it cannot be read, has no frames in the wanted part, or is too large; on one line.

    Warns:
        MediaWarning: the file is damaged or cut short; the frames that it has are returned.
    """
    if kind not in ("video", "image"):
        raise ConfigError(f"kind={kind!r} is not allowed: video or image")
    if isinstance(source, Frames):
        return from_frames(source, config, kind)
    if isinstance(source, np.ndarray | Tensor):
        return from_array(source, config, kind)
    if isinstance(source, Image.Image):
        return still(rgb_of(source, "the image"), config, kind)
    if isinstance(source, list | tuple):
        return _from_list(source, config, kind)
    with located(source, config) as (name, data):
        if kind == "image" or is_still(data):
            return still(read_image(name, data, as_video=kind == "video"), config, kind)
        return read_video(name, data, config)


def _from_list(items: Sequence[Any], config: VideoConfig, kind: str) -> Frames:
    """Return a list of images as the frames of a video; only those wanted are read."""
    name = f"the list of {len(items)} images"
    if kind == "image":
        raise MediaError(f"{name} is not one image: pass each image by itself, or the list as a video")
    if not items:
        raise MediaError(f"{name} has no frames: pass at least one image")
    index, seconds, fps = untimed(len(items), config, name)
    pixels: Tensor | None = None
    for row, item in enumerate(index.tolist()):
        image = load(items[item], config, kind="image").pixels[0]
        if pixels is None:
            check_size(name, len(index), image.shape[2], image.shape[1])
            pixels = image.new_empty((len(index), *image.shape))
        if image.shape != pixels.shape[1:]:
            (_, height, width), (_, h, w) = pixels.shape[1:], image.shape
            raise MediaError(
                f"{name}: image {item} is {w}x{h}, the first is {width}x{height}: a video's frames need one size"
            )
        pixels[row] = image
    assert pixels is not None  # untimed gives at least one index
    return Frames(pixels, seconds, fps)
