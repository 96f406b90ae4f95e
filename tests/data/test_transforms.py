import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import CenterCrop as TheirCenterCrop
from torchvision.transforms.v2 import InterpolationMode, Resize

from vqd_scale.core.config import Config, load_config
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.data.shards.decode import Pixels
from vqd_scale.data.transforms import (
    CenterCrop,
    NearCenterCrop,
    RandomResizedCrop,
    Transform,
    fitted,
    resized,
)


def position_image(height: int, width: int) -> Pixels:
    """Return an image whose colors encode positions: red grows downwards, green to the right."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def draws(transform: NearCenterCrop | RandomResizedCrop, count: int) -> list[list[float]]:
    return uniforms(0, Purpose.CROP, torch.arange(count), transform.draws).tolist()


@given(st.integers(30, 60), st.integers(30, 60), st.integers(3, 50))
def test_resizing_equals_pillow(height: int, width: int, side: int) -> None:
    pixels = noise(height, width)
    rows, columns = side * height // 30, side * width // 30
    reference_pixels = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC))
    resized_pixels = resized(pixels, rows, columns)
    assert resized_pixels.shape == reference_pixels.shape
    assert np.abs(resized_pixels.astype(int) - reference_pixels.astype(int)).max() <= 2


@pytest.mark.parametrize("shape", [(20, 60), (30, 20), (33, 47), (16, 16), (5, 9)])
def test_fitted_equals_resize_and_center_crop(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    resize = Resize(16, interpolation=InterpolationMode.BICUBIC)
    reference_pixels = np.asarray(TheirCenterCrop(16)(resize(image)))
    fitted_pixels = fitted(np.array(image), 16)
    assert fitted_pixels.shape == (16, 16, 3)
    assert np.abs(fitted_pixels.astype(int) - reference_pixels.astype(int)).max() <= 1


def test_fitted_keeps_or_crops_matching_side() -> None:
    pixels = noise(16, 16)
    assert np.array_equal(fitted(pixels, 16), pixels)
    assert np.array_equal(fitted(noise(16, 40), 16), noise(16, 40)[:, 12:28])


@pytest.mark.parametrize(
    "transform", [CenterCrop(size=256), NearCenterCrop(size=256), RandomResizedCrop(size=256)]
)
@pytest.mark.parametrize("shape", [(65_000, 1), (1, 65_000), (2, 30_000)])
def test_extreme_aspect_needs_little_memory(
    shape: tuple[int, int], transform: Transform, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def recorded(pixels: Pixels, height: int, width: int) -> Pixels:
        sizes.append(height * width)
        return resized(pixels, height, width)

    monkeypatch.setattr("vqd_scale.data.transforms.resized", recorded)
    pixels = position_image(*shape)
    crop = transform(pixels, [0.5] * transform.draws)
    assert crop.shape == (256, 256, 3)
    assert max(sizes) <= 16 * 256 * 256
    if isinstance(transform, CenterCrop):
        # The middle of the picture: the same pixels as resizing a short piece of it.
        middle = max(shape) // 2
        piece = (
            pixels[middle - 20 : middle + 20] if shape[0] > shape[1] else pixels[:, middle - 20 : middle + 20]
        )
        assert np.abs(crop.astype(int) - fitted(piece, 256).astype(int)).max() <= 1


@given(st.integers(1, 20), st.integers(1, 15), st.booleans())
def test_ordinary_aspects_are_resized_whole(short: int, aspect: int, is_tall: bool) -> None:
    pixels = noise(short * aspect, short) if is_tall else noise(short, short * aspect)
    zoomed = resized(pixels, 24 * pixels.shape[0] // short, 24 * pixels.shape[1] // short)
    row, column = (round((side - 24) / 2) for side in zoomed.shape[:2])
    np.testing.assert_array_equal(fitted(pixels, 24), zoomed[row : row + 24, column : column + 24])


def released_crop(image: Image.Image, size: int, numbers: list[float]) -> Image.Image:
    """Apply the published preprocessing literally, with Pillow and five given numbers."""
    width, height = image.size
    s = min(width, height)
    offsets: list[int] = []
    for number, long in zip(numbers, (height, width), strict=False):
        low = 3 * (long - s) // 8
        high = max(low + 1, 5 * (long - s) // 8)
        offsets.append(int(low + number * (high - low)))
    row, column = offsets
    square = image.crop((column, row, column + s, row + s))
    t_max = max(size, min(s, round(9 / 8 * size)))
    t = int(size + numbers[2] * (t_max + 1 - size))
    zoomed = square.resize((t, t), Image.Resampling.BICUBIC)
    y, x = (int(number * (t - size + 1)) for number in numbers[3:])
    return zoomed.crop((x, y, x + size, y + size))


@pytest.mark.parametrize("shape", [(100, 160), (150, 90), (64, 64), (70, 64), (20, 30)])
def test_near_center_equals_released_preprocessing(shape: tuple[int, int]) -> None:
    transform = NearCenterCrop(size=64)
    pixels = noise(*shape)
    for numbers in draws(transform, 20):
        expected = np.asarray(released_crop(Image.fromarray(pixels), 64, numbers)).astype(int)
        cropped_pixels = transform(pixels, numbers)
        assert cropped_pixels.shape == (64, 64, 3)
        assert np.abs(cropped_pixels.astype(int) - expected).max() <= 1


def test_near_center_crop_reaches_its_bounds() -> None:
    """A crop of 64 pixels from 120 x 240 shows offsets and sizes by its colors."""
    transform = NearCenterCrop(size=64)
    crops = [transform(position_image(120, 240), numbers).astype(float) for numbers in draws(transform, 600)]
    # A square of 120 starts between columns 45 and 74 and is resized to 64 to 72, of which the crop shows 64.
    pixel = np.array([(crop[-1, 32, 0] - crop[0, 32, 0]) / 63 for crop in crops])
    assert pixel.min() == pytest.approx(120 / 72, abs=0.05)
    assert pixel.max() == pytest.approx(120 / 64, abs=0.05)
    columns = np.array([crop[32, 0, 1] for crop in crops])
    assert 44 <= columns.min() < 48
    assert 80 < columns.max() <= 75 + 14
    rows = np.array([crop[0, 32, 0] for crop in crops])
    assert rows.min() < 2
    assert 11 < rows.max() <= 14
    # Never mirrored: columns grow to the right, rows downwards.
    assert all(crop[32, 60, 1] > crop[32, 4, 1] and crop[60, 32, 0] > crop[4, 32, 0] for crop in crops)
    sides = np.round(120 / pixel).astype(int)
    assert set(sides.tolist()) == set(range(64, 73))
    assert np.bincount(sides - 64, minlength=9).min() > 600 / 9 / 2


def test_near_center_enlarges_small_images() -> None:
    for numbers in draws(NearCenterCrop(size=64), 5):
        cropped_pixels = NearCenterCrop(size=64)(position_image(20, 20), numbers)
        assert np.array_equal(cropped_pixels, resized(position_image(20, 20), 64, 64))


def test_random_resized_respects_bounds() -> None:
    transform = RandomResizedCrop(size=32, scale=(0.25, 1.0))
    shares: list[float] = []
    for numbers in draws(transform, 400):
        cropped_pixels = transform(position_image(200, 160), numbers).astype(float)
        assert cropped_pixels.shape == (32, 32, 3)
        rows, columns = (
            (cropped_pixels[-1, 16, 0] - cropped_pixels[0, 16, 0]) / 31,
            (cropped_pixels[16, -1, 1] - cropped_pixels[16, 0, 1]) / 31,
        )
        assert rows > 0
        assert columns > 0
        assert 0.7 < columns / rows < 1.4
        shares.append(rows * 32 * columns * 32 / (200 * 160))
    assert 0.2 < min(shares) < 0.3
    assert 0.8 < max(shares) < 1.02


def test_random_resized_falls_back_to_center() -> None:
    transform = RandomResizedCrop(size=16, scale=(1.0, 1.0))
    for numbers in draws(transform, 5):
        assert np.array_equal(transform(noise(16, 90), numbers), fitted(noise(16, 90), 16))


def test_crop_depends_on_slot_only() -> None:
    transform = NearCenterCrop(size=64)
    one, again, other_slot_crop = (
        transform(noise(100, 100), numbers)
        for numbers in uniforms(3, Purpose.CROP, torch.tensor([7, 7, 8]), transform.draws).tolist()
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other_slot_crop)


def test_smallest_side_of_each_transform() -> None:
    assert CenterCrop(size=256).smallest_side == 256
    assert NearCenterCrop(size=256).smallest_side == 288
    # A quarter of the area, three times as wide as high at the worst.
    assert RandomResizedCrop(size=100, scale=(0.25, 1.0), ratio=(0.75, 4 / 3)).smallest_side == 231


class Holder(Config):
    transform: Transform = CenterCrop()


def test_kind_selects_transform() -> None:
    assert load_config(Holder, overrides=["transform.size=32"]).transform == CenterCrop(size=32)
    config = load_config(Holder, overrides=["transform.kind=near_center", "transform.size=32"])
    assert config.transform == NearCenterCrop(size=32)
