"""Still images, by Pillow."""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from specvlm.errors import MediaError
from specvlm.media.content import line_of, looks_like
from specvlm.media.frames import Data, check_size

_IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def read_image(name: str, data: Data) -> Tensor:
    """Return an encoded image (of an animation, its first picture) as pixels [3, H, W]."""
    Image.init()
    formats = [known for known in _IMAGE_FORMATS if known in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats) as image:
            check_size(name, 1, *image.size)
            return rgb_of(image, name)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} is not an image{looks_like(data)}: use png, jpg, webp, gif, bmp or tiff") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{name} is damaged and cannot be read ({line_of(error)}): fetch or export it again"
        ) from error


def rgb_of(image: Image.Image, name: str) -> Tensor:
    """Return the picture upright, composited on white, as pixels [3, H, W]."""
    if 0 in image.size:
        raise MediaError(f"{name} is {image.width}x{image.height}: it has no pixels")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits a pixel; PIL would clip them to 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()
