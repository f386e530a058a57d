"""Camera frames as PNG bytes and back: a sample's frame, or its history of frames one below the other."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray

from vlaopt.errors import InputError
from vlaopt.optional import require


def is_image(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether an array is a camera frame, uint8 [height, width, 3], or a history of them [steps, height, width, 3]."""
    return dtype == "uint8" and len(shape) in (3, 4) and shape[-1] == 3


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] or [T, H, W, 3] as one PNG of T · H rows."""
    buffer = io.BytesIO()
    rows = image.reshape(-1, *image.shape[-2:])
    require("PIL.Image", "data").fromarray(rows).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(
    data: bytes, shape: tuple[int, ...], *, where: str, formats: tuple[str, ...] = ("PNG",)
) -> NDArray[np.uint8]:
    """Pixels uint8 `shape`, as `encode_png` took them.

    The header's size is compared first, so that a bomb is refused before it is decoded. Raises InputError, with
    `where`, for another size and for what is no sound image of `formats`.
    """
    pillow = require("PIL.Image", "data")
    height, width = math.prod(shape[:-2]), shape[-2]
    try:
        with pillow.open(io.BytesIO(data), formats=formats) as image:
            if (image.height, image.width) != (height, width) or image.mode != "RGB":
                raise InputError(
                    f"a {image.format} of {image.mode} {image.height}x{image.width}, RGB {height}x{width} is needed",
                    where=where,
                )
            pixels: NDArray[np.uint8] = np.array(image).reshape(shape)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"not a sound {' or '.join(formats)}: {error}", where=where, hint="record it again") from error
    return pixels
