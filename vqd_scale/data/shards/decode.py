"""Decoding of member bytes to images, text and arrays; failures raise `BadSample` with a reason."""

import functools
import io
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import PurePath
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from numpy.lib import format as npy
from PIL import Image, UnidentifiedImageError
from pydantic import TypeAdapter

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.safe_json import JSON, parse_json
from vqd_scale.data.config import DecodeConfig

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")

# Allowlist: Pillow would start a PostScript interpreter for an EPS file.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")

_MAX_SCANS = 100
"""Maximum number of scans of a JPEG, as in libtiff. Encoders write about 10; each visits every pixel."""

_STRIP = 512
"""Height in pixels of the strips in which an image is converted."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that turns an image upright, by EXIF orientation."""

_CAPTIONS: TypeAdapter[str | list[str] | None] = TypeAdapter(str | list[str] | None)
_HEADER_SIZE = slice(npy.MAGIC_LEN, npy.MAGIC_LEN + 2)
"""Position of the header length in a ``.npy`` file."""

Pixels = UInt8[NDArray[np.uint8], "height width 3"]
"""Image as 8-bit RGB."""


class BadSample(Exception):
    """Error for one unusable sample; the message completes the sentence 'this sample …'."""


def image_extension(extensions: Container[str]) -> str:
    """Return the extension of a sample's image among those of its members; a `BadSample` if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in extensions:
            return extension
    raise BadSample("has no image")


def image_extension_of(name: str) -> str:
    """Return the image extension of a file name, such as ``jpg`` for ``a.JPG`` and ``a.jpg_large``, or ''."""
    extension = re.split("[_:?!-]", PurePath(name).suffix.lower()[1:], maxsplit=1)[0]
    if extension in ("jpe", "jfif"):
        return "jpg"
    return extension if extension in IMAGE_EXTENSIONS else ""


def decode_image(
    data: bytes, config: DecodeConfig | None = None, *, smallest_side: int | None = None
) -> Pixels:
    """Decode the first frame of an image as 8-bit RGB.

    The EXIF orientation is applied. Transparency is composited over white, because images with transparency
    are mostly drawings for a white page. Of 16-bit samples, the upper 8 bits are kept.

    Args:
        data: File content.
        config: Decoding options; None takes the defaults.
        smallest_side: Minimum shorter side in pixels that the transform needs, for ``dct_scaled``.

    Raises:
        BadSample: Not an image, damaged, or larger than ``max_pixels``.
    """
    config = DecodeConfig() if config is None else config
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > config.max_pixels:
                raise BadSample(f"has {image.width} x {image.height} pixels, more than {config.max_pixels}")
            # In the data of a scan, 0xFF is followed by 0 or by a restart marker.
            if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
                raise BadSample(f"is a JPEG of {scans} scans, more than {_MAX_SCANS}")
            is_plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
            if is_plain_jpeg and config.dct_scaled and smallest_side is not None:
                image.draft(image.mode, (smallest_side, smallest_side))
            elif is_plain_jpeg and _turn(image) is None:
                return _decoded_jpeg(data)
            image.load()
            return rgb_pixels(upright(image))
    except BadSample:
        raise
    except UnidentifiedImageError:
        # The original message contains a memory address; reasons must be reproducible.
        raise BadSample("is not a readable image (of no known kind)") from None
    # Decoders raise anything on damaged bytes: OSError, KeyError, TypeError, MemoryError for a wrong size, …
    except Exception as error:  # noqa: BLE001 - see above
        raise BadSample(f"is not a readable image ({str(error) or type(error).__name__})") from None


def image_format(data: bytes) -> str:
    """Return the extension for an image of which only the content is known; a `BadSample` if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return "jpg" if image.format in ("JPEG", "MPO") else str(image.format).lower()
    except Exception:  # noqa: BLE001 - as in `decode_image`
        raise BadSample("is not a readable image (of no known kind)") from None


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns an image upright.

    Pillow's ``exif_transpose`` also writes the EXIF data again, and fails if a tag has another type than the
    standard's. Unreadable EXIF data are ignored, as viewers do.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - anything, as for damaged pixels
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _decoded_jpeg(data: bytes) -> Pixels:
    """Decode a JPEG with torchvision: the same pixels as Pillow in three quarters of the time."""
    # Imported here: the import takes a second, which token readers avoid.
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    # Copied: torch has no read-only tensors and would warn.
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        decoded = cast(torch.Tensor, decode_jpeg(file, mode=ImageReadMode.RGB))
    except RuntimeError:
        # The original message is a line of C++ source.
        raise ValueError("the JPEG is cut or damaged") from None
    return decoded.permute(1, 2, 0).numpy()


def decode_text(data: bytes) -> str:
    """Decode a caption and strip white space; a `BadSample` if it is not UTF-8, or empty."""
    if not (text := _stripped(data)):
        raise BadSample("has an empty caption")
    return text


def decode_captions(members: Mapping[str, bytes], place: str = "txt") -> list[str]:
    """Decode the captions of a sample, without empty ones.

    ``json`` may list all captions under ``captions``; the first one is that of ``txt`` if it is not empty.

    Args:
        members: Content by extension.
        place: Extension of the member with the first caption, or ``json.FIELD`` for captions in that field.

    Raises:
        BadSample: The sample has no caption, or one that is not text.
    """
    extension, _, field = place.partition(".")
    content = decode_json(members["json"]) if "json" in members else None
    captions = listed_captions(content, field or "captions")
    if not field and extension in members and (first := _stripped(members[extension])):
        captions = [first, *captions[1:]]
    if captions:
        return captions
    if extension in members:
        raise BadSample("has an empty caption" if not field else f"has no caption in '{place}'")
    raise no_member(extension, members)


def listed_captions(content: object, field: str = "captions") -> list[str]:
    """Return the captions in a field of a sample's ``json``, without empty ones.

    Raises:
        BadSample: The field is neither text nor a list of texts.
    """
    value = cast("Mapping[str, Any]", content).get(field) if isinstance(content, dict) else None
    try:
        captions = _CAPTIONS.validate_python(value, strict=True)
    except ValueError:
        raise BadSample(f"has a '{field}' that is neither text nor a list of texts") from None
    return [
        text for text in map(str.strip, [captions] if isinstance(captions, str) else captions or []) if text
    ]


def no_member(extension: str, members: Iterable[str]) -> BadSample:
    """Return the error for a missing member, which names the members that the sample has."""
    names = sorted(name for name in members if not name.startswith("__"))
    return BadSample(f"has no '{extension}', only {', '.join(map(repr, names))}")


def decode_json(data: bytes) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Decode a JSON member; a `BadSample` if it is invalid, too deep, or has half of a surrogate pair."""
    try:
        return parse_json(data, JSON)
    except ValueError:
        raise BadSample("has a member that is not JSON") from None


def _stripped(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("has a caption that is not UTF-8") from None


def decode_array(data: bytes) -> NDArray[Any]:
    """Decode a ``.npy`` member as a read-only view of its bytes.

    Raises:
        BadSample: Not a version 1 ``.npy`` file of plain numbers, or truncated.
    """
    start = _HEADER_SIZE.stop + int.from_bytes(data[_HEADER_SIZE], "little")
    try:
        dtype, shape = _array_header(data[:start])
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
    # The header is a Python expression, whose parser raises anything.
    except Exception as error:  # noqa: BLE001 - see above
        raise BadSample(f"has an array that cannot be read ({error})") from None


def decode_arrays(contents: Sequence[bytes]) -> Iterator[tuple[list[int], NDArray[Any] | BadSample]]:
    """Decode many ``.npy`` members in groups of equal header and length.

    Nearly all members of a dataset fall into one group, which is decoded in one call.

    Yields:
        The indices of a group, and its stacked arrays or the error.
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
    """Parse a header, cached: a dataset's arrays share one, and parsing takes longer than reading."""
    file = io.BytesIO(header)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("not version 1 of the format")
    shape, is_fortran_ordered, dtype = npy.read_array_header_1_0(file)
    if is_fortran_ordered or dtype.hasobject:
        raise ValueError("not plain numbers in C order")
    return dtype, shape


def rgb_pixels(image: Image.Image) -> Pixels:
    """Convert an image to RGB: transparent pixels become white, 16-bit values their upper 8 bits.

    In strips, since whole copies in several modes would take gigabytes.

    Raises:
        ValueError: The pixels are floating-point numbers, whose range is not defined.
    """
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        pixels[top : top + _STRIP] = np.asarray(_as_rgb(strip))
    return pixels


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
