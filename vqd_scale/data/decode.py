"""From a member's bytes to arrays and pictures; what cannot be decoded is a `BadSample` with a reason."""

import functools
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485
"""Pictures with more pixels (a quarter of a gigabyte as RGB) are refused before they are unpacked."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class BadSample(Exception):
    """One sample cannot be used; the message completes the sentence 'this sample …'."""


def decode_image(data: bytes) -> Image.Image:
    """Unpack a picture as 8-bit RGB: upright, its first frame, over white where it is transparent.

    Raises:
        BadSample: Not a picture, damaged, or larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    # What Pillow's decoders raise on damaged bytes; the bytes are in memory, so an OSError is theirs too.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise BadSample(f"is not a readable picture ({error})") from None


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to ``size`` (bicubic, anti-aliased) and cut the centre square."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def decode_text(data: bytes) -> str:
    """A caption, without white space around it.

    Raises:
        BadSample: Not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("has a caption that is not UTF-8") from None
    if not text:
        raise BadSample("has an empty caption")
    return text


def decode_json(data: bytes) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """A JSON member.

    Raises:
        BadSample: Not JSON.
    """
    try:
        return json.loads(data)
    except ValueError:
        raise BadSample("has a member that is not JSON") from None


def decode_array(data: bytes) -> NDArray[Any]:
    """A ``.npy`` member as a read-only view of its bytes.

    Raises:
        BadSample: Not a version 1 ``.npy`` file of plain numbers, or cut.
    """
    start = npy.MAGIC_LEN + 2 + int.from_bytes(data[npy.MAGIC_LEN : npy.MAGIC_LEN + 2], "little")
    try:
        dtype, shape = _array_header(data[:start])
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
    except (ValueError, SyntaxError) as error:
        raise BadSample(f"has an array that cannot be read ({error})") from None


@functools.lru_cache(maxsize=64)
def _array_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Parse a header once: all arrays of a set have the same one, and parsing takes longer than reading."""
    file = io.BytesIO(header)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("not version 1 of the format")
    shape, is_fortran_ordered, dtype = npy.read_array_header_1_0(file)
    if is_fortran_ordered or dtype.hasobject:
        raise ValueError("not plain numbers in C order")
    return dtype, shape


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
