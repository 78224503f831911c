"""Still images, by Pillow."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from specvlm.core.errors import MediaError
from specvlm.media.content import described, has_second, line_of
from specvlm.media.frames import Data, MediaWarning, check_size

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def read_image(name: str, data: Data, *, as_video: bool = False) -> Tensor:
    """Return an encoded image (of an animation, its first picture) as pixels [3, H, W].

    Warns:
        MediaWarning: `as_video`, and there are further pages, which are not read.
    """
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]
    try:
        with _damage(name), Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats) as image:
            check_size(name, 1, *image.size)
            pages = getattr(image, "n_frames", 1)
            if as_video and image.format == "TIFF" and pages > 1:
                text = f"{name} has {pages} pages, of which the first is read: pass them as a list of images"
                warnings.warn(text, MediaWarning, stacklevel=4)
            elif as_video and has_second(data):
                text = f"{name} has more pictures behind the first, which alone is read: pass them as a list of images"
                warnings.warn(text, MediaWarning, stacklevel=4)
            return _rgb(image, name, is_file=True)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} is not an image{described(data, 'image')}") from error


def rgb_of(image: Image.Image, name: str) -> Tensor:
    """Return a picture upright, composited on white, as pixels [3, H, W].

    Raises:
        MediaError: it has no pixels, a mode whose scale nobody knows, or its file cannot be read to the end.
    """
    with _damage(name):
        return _rgb(image, name, is_file=False)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn what Pillow raises about a damaged file, which it may read long after it was opened, into a MediaError."""
    try:
        yield
    except UnidentifiedImageError:
        raise
    except (
        AttributeError,  # a closed image
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        OverflowError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise MediaError(
            f"{name} is damaged and cannot be read ({line_of(error)}): fetch or export it again"
        ) from error


def _rgb(image: Image.Image, name: str, *, is_file: bool) -> Tensor:
    if 0 in image.size:
        raise MediaError(f"{name} is {image.width}x{image.height}: it has no pixels")
    upright = ImageOps.exif_transpose(image)
    # Older Pillows open a PNG or PPM of 16 bits as 32-bit integers
    is_16_bit = upright.mode.startswith("I;16") or (is_file and upright.mode == "I" and image.format in ("PNG", "PPM"))
    if is_16_bit:  # PIL would clip them to 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif upright.mode.startswith(("I", "F")):
        kind = "32-bit integers" if upright.mode.startswith("I") else "floats"
        raise MediaError(
            f"{name} has pixels of mode {upright.mode} ({kind}), whose scale is unknown: convert it to L or RGB"
        )
    elif upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()
