import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from vqd_scale.data.decode import BadSample, decode_array, decode_image, decode_json, decode_text, fitted


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format=kind, **options)
        return file.getvalue()


def gradient() -> Image.Image:
    ramp = np.linspace(0, 255, 24).astype(np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:16, None], 255 - ramp), axis=-1))


def test_rgb_is_kept() -> None:
    decoded = decode_image(file_of(gradient()))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(gradient()))


def test_orientation_of_a_camera() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(file_of(gradient(), exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(np.asarray(gradient()), k=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_is_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    data = (
        file_of(clear) if mode == "RGBA" else file_of(clear.convert(mode), "TIFF" if mode == "PA" else "PNG")
    )
    expected = 255 if mode in ("RGBA", "LA", "PA") else None
    decoded = np.asarray(decode_image(data))
    assert decoded.shape == (4, 4, 3)
    assert expected is None or (decoded == expected).all()


def test_sixteen_bits() -> None:
    levels = np.array([[0, 255, 256, 65_535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(file_of(Image.fromarray(levels))))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 255]


def test_other_modes_and_first_frame() -> None:
    assert np.asarray(decode_image(file_of(Image.new("CMYK", (2, 2)), "JPEG"))).min() > 250
    assert np.asarray(decode_image(file_of(Image.new("L", (2, 2), 7)))).tolist() == [[[7] * 3] * 2] * 2
    assert np.asarray(decode_image(file_of(Image.new("1", (2, 2), 1)))).min() == 255
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animated = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(animated))[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(BadSample, match="floating-point"):
        decode_image(file_of(Image.new("F", (2, 2)), "TIFF"))


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid header and a body that would unpack to gigabytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(40_000, 40_000), (10_000, 10_000)])
def test_pixel_bombs(size: tuple[int, int]) -> None:
    with pytest.raises(BadSample, match="pixels"):
        decode_image(png_of_zeros(*size))


# Pillow says of some damage that it is there before it gives up or goes on.
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_are_bad_samples(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    whole = bytearray(file_of(gradient(), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert decode_image(cut).mode == "RGB"
    except BadSample as error:
        # Either outcome is right; any other exception is not.
        assert str(error)


@given(
    arrays.arrays(
        dtype=st.sampled_from([np.uint16, np.int32, np.int64, np.float32]),
        shape=arrays.array_shapes(max_dims=2),
    )
)
def test_arrays_as_numpy_reads_them(array: NDArray[Any]) -> None:
    with io.BytesIO() as file:
        np.save(file, array)
        data = file.getvalue()
    np.testing.assert_array_equal(decode_array(data), array)
    assert decode_array(data).dtype == array.dtype
    with pytest.raises(BadSample):
        decode_array(data[:-1])


def test_arrays_of_objects_are_refused() -> None:
    with io.BytesIO() as file:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        data = file.getvalue()
    with pytest.raises(BadSample, match="plain numbers"):
        decode_array(data)


def test_fitted_cuts_the_centre() -> None:
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste((255, 0, 0), (20, 0, 40, 20))
    assert np.asarray(fitted(wide, 10))[:, 2:-2].reshape(-1, 3).tolist() == [[255, 0, 0]] * 60
    assert fitted(wide, 10).size == (10, 10)


def test_text_and_json() -> None:
    assert decode_text(" ein Bär\n".encode()) == "ein Bär"
    assert decode_json(b'{"a": 1}') == {"a": 1}
    with pytest.raises(BadSample, match="UTF-8"):
        decode_text(b"\xff\xfe")
    with pytest.raises(BadSample, match="empty"):
        decode_text(b" \n")
    with pytest.raises(BadSample, match="JSON"):
        decode_json(b"{")
