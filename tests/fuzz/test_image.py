"""Fuzzing of the decoders: images of every format that is read, and arrays."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.data.shards.decode import BadSample, decode_array, decode_arrays, decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 4)).astype(np.uint8)
IMAGE = Image.fromarray(PIXELS)


def file_of(kind: str, mode: str = "RGB", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    with io.BytesIO() as file:
        IMAGE.convert(mode).save(file, format=kind, exif=exif, **options)
        return file.getvalue()


IMAGES = [
    file_of("JPEG"),
    file_of("JPEG", progressive=True),
    file_of("JPEG", "CMYK"),
    file_of("PNG", "RGBA"),
    file_of("PNG", "P"),
    file_of("PNG", "I;16"),
    file_of("GIF", "P", save_all=True, append_images=[IMAGE.convert("P")]),
    file_of("BMP"),
    file_of("WEBP"),
    file_of("WEBP", "RGBA", lossless=True),
    file_of("AVIF"),
    *(file_of("TIFF", compression=name) for name in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seconds", SECONDS)
def test_damaged_images_are_bad_samples(seconds: float, tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        pixels = decode_image(data)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3

    assert fuzz(target, IMAGES, seconds, tmp_path / "failure") > len(IMAGES)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "RGB", "CMYK"])
def test_largest_image_fits_into_a_gigabyte(mode: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with io.BytesIO() as file:
        Image.new(mode, (9_400, 9_500)).save(file, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
        data = file.getvalue()

    def target(data: bytes) -> None:
        try:
            assert sorted(decode_image(data).shape) == [3, 9_400, 9_500]
        except BadSample as error:
            raise AssertionError from error

    assert fuzz(target, [data], 0, tmp_path / "failure") == 1


def array_of(descr: str, shape: str, size: int = 24) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


ARRAYS = [
    array_of("'<u2'", "(12,)"),
    array_of("'<i4'", "(2, 3)"),
    array_of("'<f8'", "(2**40,)"),
    array_of("'<f8'", "(1099511627776,)"),
    array_of("'<f8'", "(-1, 3)"),
    array_of("'|O'", "(3,)"),
    array_of("[('a', '<i4'), ('b', '<u2', (2,))]", "(3,)"),
    array_of("('<i4', (2,))", "(3,)"),
    array_of("'<U0'", "(3,)"),
    array_of("'M8[s]'", "(3,)"),
    array_of("__import__('os').system('x')", "(3,)"),
    array_of("'<i4'", "(" * 500),
    array_of("'<i4'", "-" * 5000 + "1"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seconds", SECONDS)
def test_damaged_arrays_are_bad_samples(seconds: float, tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        for _ in decode_arrays([data, ARRAYS[0], data]):
            pass
        assert decode_array(data).nbytes <= len(data)

    assert fuzz(target, ARRAYS, seconds, tmp_path / "failure") > len(ARRAYS)
