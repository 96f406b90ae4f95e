import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vqd_scale.data.shards.decode import Pixels, decode_image
from vqd_scale.data.shards.perceptual_hash import MARGINS, KnownPictures, margin_hashes, picture_hash

COUNT = 40


def picture(number: int, height: int = 200, width: int = 300) -> Pixels:
    rng = np.random.default_rng(number)
    places = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    colours = np.full((height, width, 3), 128.0)
    for _ in range(12):
        wave = np.sin(2 * np.pi * (places * rng.uniform(-4, 4, (2, 1, 1))).sum(axis=0) + rng.uniform(0, 6))
        colours += wave[..., None] * rng.normal(0, 20, 3)
    return (colours + rng.normal(0, 4, colours.shape)).clip(0, 255).astype(np.uint8)


def recompressed(pixels: Pixels) -> Pixels:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=30)
        return decode_image(file.getvalue())


def scaled(pixels: Pixels, width: int, height: int) -> Pixels:
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def without_margin(pixels: Pixels, share: float) -> Pixels:
    top, left = (int(share * side) for side in pixels.shape[:2])
    return pixels[top : pixels.shape[0] - top, left : pixels.shape[1] - left]


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
def known() -> KnownPictures:
    hashes = [single for number in range(COUNT) for single in margin_hashes(picture(number))]
    return KnownPictures(np.array(hashes, np.uint64), tuple(map(str, range(COUNT))), max_distance=8)


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found(known: KnownPictures, copy: str) -> None:
    for number in range(COUNT):
        found = known.nearest(COPIES[copy](picture(number)))
        assert found is not None
        assert found[0] == str(number)


def test_others_are_not(known: KnownPictures) -> None:
    assert [known.nearest(picture(1000 + number)) for number in range(100)] == [None] * 100


def test_the_nearest_by_a_loop(known: KnownPictures) -> None:
    """The slow twin: bit by bit, one known hash after the other."""
    loose = KnownPictures(known.hashes, known.keys, 64)
    for number in range(1000, 1010):
        own = int(picture_hash(picture(number)))
        distances = [bin(own ^ int(single)).count("1") for single in known.hashes]
        best = min(distances)
        assert loose.nearest(picture(number)) == (str(distances.index(best) // len(MARGINS)), best)


def test_the_fingerprint_says_what_is_found(known: KnownPictures) -> None:
    assert known.fingerprint != KnownPictures(known.hashes, known.keys, 9).fingerprint
    assert known.fingerprint != KnownPictures(known.hashes[1:], known.keys, 8).fingerprint
