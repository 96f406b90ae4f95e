"""Images and masks that a user gives: the same reading for the Python API and the tools; needs no torch."""

import io
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import BadSample, decode_image, rgb_pixels, upright

ImageInput: TypeAlias = Image.Image | UInt8[NDArray[np.uint8], "height width *channels"] | PathLike[str] | str
"""PIL image of any mode, array of bytes, or path of an image file."""

_THRESHOLD = 128


def read_image(image: ImageInput, name: str) -> Image.Image:
    """Return an upright image of any mode.

    Args:
        image: Image.
        name: Name of the argument, for error messages.

    Raises:
        UserError: The file is missing, damaged or too large, or the argument is no image.
    """
    subject = str(image) if isinstance(image, str | PathLike) else "this image"
    try:
        if isinstance(image, str | PathLike):
            data = Path(image).read_bytes()
            # The bounds on formats and sizes are those of a dataset.
            decode_image(data)
            image = Image.open(io.BytesIO(data))
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        image.load()
        return upright(image)
    except BadSample as error:
        raise UserError(f"{name}: {subject} {error}.") from None
    except OSError as error:
        raise UserError(f"{name}: {subject} cannot be read ({error.strerror or error}).") from None
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{name}: expected a PIL image, an array of bytes or a path ({error}).") from None


def fitted_image(image: Image.Image, width: int, height: int) -> UInt8[NDArray[np.uint8], "height width 3"]:
    """Center-crop an image of any mode to an aspect ratio, and resize it; see `rgb_pixels` for the colors.

    Raises:
        UserError: The pixels are floating-point numbers.
    """
    try:
        rgb = Image.fromarray(rgb_pixels(image))
    except ValueError as error:
        raise UserError(f"image: {error}.") from None
    return np.array(ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS))


def fitted_mask(mask: Image.Image, width: int, height: int) -> Bool[NDArray[np.bool_], "height width"]:
    """Crop and resize a mask like `fitted_image`; a pixel is True if it covers any painted pixel.

    In a mask with transparent pixels, as a drawing program exports, what is opaque is painted, whatever its
    color. In any other mask, white (128 and above) is painted.

    Raises:
        UserError: The pixels are floating-point numbers.
    """
    painted = _painted(mask)
    rows, columns = painted.shape
    # The crop of `ImageOps.fit`, in fractions of a pixel.
    crop_width, crop_height = min(columns, rows * width / height), min(rows, columns * height / width)
    painted = _covered(painted, (rows - crop_height) / 2, crop_height, height)
    return _covered(painted.T, (columns - crop_width) / 2, crop_width, width).T


def _painted(mask: Image.Image) -> Bool[NDArray[np.bool_], "height width"]:
    if mask.has_transparency_data:
        opaque = np.asarray(mask.convert("RGBA"))[..., 3] >= _THRESHOLD
        if not opaque.all():
            return opaque
    try:
        return np.asarray(Image.fromarray(rgb_pixels(mask)).convert("L")) >= _THRESHOLD
    except ValueError as error:
        raise UserError(f"mask: {error}.") from None


def _covered(
    painted: Bool[NDArray[np.bool_], "rows columns"], start: float, extent: float, count: int
) -> Bool[NDArray[np.bool_], "count columns"]:
    """Divide an interval of the rows into equal parts; a part is True where any row that it touches is."""
    edges = start + extent * np.arange(count + 1) / count
    # The tolerance is for rounding: an edge at 2.0000001 does not touch row 2.
    first = np.floor(edges[:-1] + 1e-6).astype(int)
    last = np.ceil(edges[1:] - 1e-6).astype(int)
    sums = np.pad(painted.cumsum(axis=0), ((1, 0), (0, 0)))
    return sums[last] > sums[first]
