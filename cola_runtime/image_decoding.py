"""PNG and JPEG bytes, from anybody, to the uint8 values that a base model normalises.

Equal to transformers' `load_image`, which turns an image as its EXIF orientation says, its `convert_to_rgb`,
which puts transparency on white, and the resizing and cropping of its PIL image processors.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from cola_runtime.image_processing import ImageProcessing

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 32_000_000  # of an image as sent, and as resized: a photograph's, about 100 MB decoded
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")  # the others have more than 8 bits
# What Pillow's decoders raise for bytes that are no image, or not all of one
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


class ImageRefused(Exception):
    """An image cannot be taken: a stable reason, and what is wrong with it."""

    def __init__(self, reason: str, message: str, *, limit: object = None, actual: object = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.limit, self.actual = reason, message, limit, actual


def decode_image(content: bytes, processing: ImageProcessing) -> NDArray[np.uint8]:
    """[channels, height, width] of `processing.shape`.

    Raises ImageRefused: `IMAGE_FORMAT` for what is neither PNG nor JPEG or has more than 8 bits a value,
    `IMAGE_TOO_LARGE` before anything is decoded, `IMAGE_BROKEN`.
    """
    try:
        with Pillow.open(io.BytesIO(content), formats=FORMATS) as image:
            _check(image, processing)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Pillow.DecompressionBombError as error:
        raise _too_large("more than any image") from error
    except UnidentifiedImageError as error:
        raise ImageRefused("IMAGE_FORMAT", f"the image is neither {' nor '.join(FORMATS)}") from error
    except _BROKEN as error:
        raise ImageRefused("IMAGE_BROKEN", f"the image is cut off or damaged: {str(error)[:80]}") from error
    plain = _without_alpha(upright).convert("RGB" if processing.channels == 3 else "L")
    height, width = processing.resized((plain.height, plain.width))
    if processing.resize is not None:
        plain = plain.resize((width, height), resample=Pillow.Resampling(processing.resample))
    values_HWC = np.asarray(plain).reshape(height, width, processing.channels)
    return np.ascontiguousarray(_centre(values_HWC, processing.shape[1:]).transpose(2, 0, 1))


def _check(image: Pillow.Image, processing: ImageProcessing) -> None:
    """By the header alone."""
    if image.mode not in _MODES:
        message = f"the image's values are of mode {image.mode}, which has more than 8 bits"
        raise ImageRefused("IMAGE_FORMAT", message, limit=", ".join(_MODES), actual=image.mode)
    height, width = size = (image.height, image.width)
    if height * width > MAX_PIXELS:
        raise _too_large(f"{height} x {width}")
    turned = processing.resized(size), processing.resized((width, height))
    if any(high * wide > MAX_PIXELS for high, wide in turned):
        raise _too_large(f"{height} x {width}, too narrow to be resized")


def _without_alpha(image: Pillow.Image) -> Pillow.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    image = image.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)


def _centre(values_HWC: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """Cut out, or with zeros around, as transformers' center_crop rounds it."""
    for axis, wanted in enumerate(size):
        found = values_HWC.shape[axis]
        if found > wanted:
            start = (found - wanted) // 2
            values_HWC = values_HWC.take(range(start, start + wanted), axis=axis)
        elif found < wanted:
            before = -(-(wanted - found) // 2)
            pads = [(0, 0)] * 3
            pads[axis] = (before, wanted - found - before)
            values_HWC = np.pad(values_HWC, pads)
    return values_HWC


def _too_large(actual: str) -> ImageRefused:
    return ImageRefused(
        "IMAGE_TOO_LARGE",
        f"the image has too many pixels: {actual}",
        limit=f"{MAX_PIXELS} pixels",
        actual=f"{actual} pixels",
    )
