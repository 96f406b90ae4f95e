"""From a member's bytes to arrays and pictures; what cannot be decoded is a `BadSample` with a reason."""

import functools
import io
import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.lib import format as npy
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.config import Config

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

# No others: Pillow would start a PostScript interpreter for an EPS file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112

_HEADER_SIZE = slice(npy.MAGIC_LEN, npy.MAGIC_LEN + 2)
"""Where a ``.npy`` file says how long its header is."""

Pixels = UInt8[NDArray[np.uint8], "height width 3"]
"""A picture as RGB bytes."""


class BadSample(Exception):
    """One sample cannot be used; the message completes the sentence 'this sample …'."""


class DecodeConfig(Config):
    """How pictures are unpacked.

    Attributes:
        max_pixels: Pictures with more are refused before they are unpacked; the default is a quarter of a
            gigabyte as RGB, the highest value Pillow's own bound.
        dct_scaled: Unpack a JPEG at a half, quarter or eighth of its size where the transform needs no more:
            about twice as fast, but some pixels differ by tens of levels from a picture unpacked whole and
            resized, so that it stays off where a published result is to be reached.
    """

    max_pixels: int = Field(default=89_478_485, ge=1, le=178_956_970)
    dct_scaled: bool = False


def decode_image(
    data: bytes, config: DecodeConfig | None = None, *, smallest_side: int | None = None
) -> Pixels:
    """Unpack a picture as 8-bit RGB: upright, its first frame, over white where it is transparent.

    White, because pictures with transparency are mostly drawings for a white page. Of 16 bits the upper 8 are
    kept.

    Args:
        data: The file's bytes.
        config: How; the defaults if not given.
        smallest_side: How long the shorter side must be at least, for ``dct_scaled``.

    Raises:
        BadSample: Not a picture, damaged, or larger than ``max_pixels``.
    """
    config = DecodeConfig() if config is None else config
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > config.max_pixels:
                raise BadSample(f"has {image.width} x {image.height} pixels, more than {config.max_pixels}")
            is_plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
            if is_plain_jpeg and config.dct_scaled and smallest_side is not None:
                image.draft(image.mode, (smallest_side, smallest_side))
            elif is_plain_jpeg and ("exif" not in image.info or image.getexif().get(_ORIENTATION, 1) == 1):
                return _decoded_jpeg(data)
            image.load()
            return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        # Its own words name an address in memory, and reasons must be the same each time.
        raise BadSample("is not a readable picture (of no known kind)") from None
    # What the decoders raise on damaged bytes; the bytes are in memory, so an OSError is theirs too.
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


def _decoded_jpeg(data: bytes) -> Pixels:
    """A JPEG by torchvision: Pillow's pixels in three quarters of its time."""
    # Here, since it takes a second that processes which read tokens need not spend.
    from torchvision.io import ImageReadMode, decode_jpeg

    # A copy: torch has no read-only tensors, and would warn of one.
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        decoded = cast(torch.Tensor, decode_jpeg(file, mode=ImageReadMode.RGB))
    except RuntimeError:
        # Its own words are a line of its source code.
        raise ValueError("the JPEG is cut or damaged") from None
    return decoded.permute(1, 2, 0).numpy()


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
    start = _HEADER_SIZE.stop + int.from_bytes(data[_HEADER_SIZE], "little")
    try:
        dtype, shape = _array_header(data[:start])
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
    except (ValueError, SyntaxError) as error:
        raise BadSample(f"has an array that cannot be read ({error})") from None


def decode_arrays(contents: Sequence[bytes]) -> Iterator[tuple[list[int], NDArray[Any] | BadSample]]:
    """`decode_array` of many: which of the contents are alike, and their arrays in one, or what is wrong.

    Those with equal headers and lengths are alike, in a set nearly all, and are decoded at once.
    """
    by_size: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, content in enumerate(contents):
        by_size[len(content), content[_HEADER_SIZE]].append(number)
    for numbers in by_size.values():
        while numbers:
            try:
                first = decode_array(contents[numbers[0]])
            except BadSample as error:
                yield numbers[:1], error
                numbers = numbers[1:]
                continue
            joined = np.frombuffer(b"".join(contents[number] for number in numbers), np.uint8)
            stacked = joined.reshape(len(numbers), -1)
            start = stacked.shape[1] - first.nbytes
            alike = (stacked[:, :start] == stacked[0, :start]).all(axis=1)
            arrays = stacked[alike, start:].view(first.dtype)
            yield list(compress(numbers, alike)), arrays.reshape(len(arrays), *first.shape)
            numbers = list(compress(numbers, ~alike))


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
