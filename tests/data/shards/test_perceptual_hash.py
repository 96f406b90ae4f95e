import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vqd_scale.data.shards.decode import Pixels, decode_image
from vqd_scale.data.shards.perceptual_hash import MARGINS, ExcludedImages, image_hash, margin_hashes

COUNT = 40


def random_image(number: int, height: int = 200, width: int = 300) -> Pixels:
    rng = np.random.default_rng(number)
    places = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    colors = np.full((height, width, 3), 128.0)
    for _ in range(12):
        wave = np.sin(2 * np.pi * (places * rng.uniform(-4, 4, (2, 1, 1))).sum(axis=0) + rng.uniform(0, 6))
        colors += wave[..., None] * rng.normal(0, 20, 3)
    return (colors + rng.normal(0, 4, colors.shape)).clip(0, 255).astype(np.uint8)


def recompressed(pixels: Pixels) -> Pixels:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=30)
        return decode_image(file.getvalue())


def scaled(pixels: Pixels, width: int, height: int) -> Pixels:
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def without_margin(pixels: Pixels, share: float) -> Pixels:
    margin_rows, margin_columns = (int(share * side) for side in pixels.shape[:2])
    return pixels[
        margin_rows : pixels.shape[0] - margin_rows, margin_columns : pixels.shape[1] - margin_columns
    ]


COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "the same": lambda pixels: pixels,
    "re-encoded": recompressed,
    "resized": lambda pixels: scaled(pixels, 128, 85),
    "squeezed": lambda pixels: scaled(pixels, 256, 256),
    "darker": lambda pixels: (pixels * 0.7).astype(np.uint8),
    "cropped a little": lambda pixels: without_margin(pixels, 0.03),
    "cropped more": lambda pixels: without_margin(pixels, 0.11),
    "all of it": lambda pixels: recompressed(scaled(without_margin(pixels, 0.06), 150, 100)),
}


@pytest.fixture(scope="module")
def known_images() -> ExcludedImages:
    hashes = [single for number in range(COUNT) for single in margin_hashes(random_image(number))]
    return ExcludedImages(np.array(hashes, np.uint64), tuple(map(str, range(COUNT))), max_distance=8)


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found(known_images: ExcludedImages, copy: str) -> None:
    for number in range(COUNT):
        reason = known_images.match(COPIES[copy](random_image(number)))
        assert reason.startswith(f"is nearly the image '{number}' (")


def test_distinct_images_do_not_match(known_images: ExcludedImages) -> None:
    assert [known_images.match(random_image(1000 + number)) for number in range(100)] == [""] * 100


def test_match_equals_a_loop(known_images: ExcludedImages) -> None:
    """Compare with a loop over all known hashes and bits."""
    loose = ExcludedImages(known_images.hashes, known_images.keys, 64)
    for number in range(1000, 1010):
        expected = int(image_hash(random_image(number)))
        distances = [bin(expected ^ int(single)).count("1") for single in known_images.hashes]
        best = min(distances)
        image = distances.index(best) // len(MARGINS)
        reason = f"is nearly the image '{image}' ({best} of 64 bits differ)"
        assert loose.match(random_image(number)) == reason


def test_fingerprint_covers_hashes_and_threshold(known_images: ExcludedImages) -> None:
    assert known_images.fingerprint != ExcludedImages(known_images.hashes, known_images.keys, 9).fingerprint
    assert (
        known_images.fingerprint != ExcludedImages(known_images.hashes[1:], known_images.keys, 8).fingerprint
    )
