"""64-bit perceptual hash (DCT hash) for near-duplicate images.

The hash is the sign pattern of an image's lowest frequencies, which re-encoding and resizing hardly change.
Excluded images are also hashed with several margins cut off, so that cropped copies match. A candidate's
hash is compared with all their hashes by linear search: for the 40,504 images of COCO's validation split,
this takes less time than decoding the candidate, and needs no search tree.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt64

from vqd_scale.core.arrays import NDArray
from vqd_scale.data.shards.decode import Pixels
from vqd_scale.data.transforms import resized

MARGINS = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125)
"""Margins cut off an excluded image before hashing, as fractions of the side, at each edge."""

_SIDE = 32
_FREQUENCIES = 8


@dataclass(frozen=True)
class ExcludedImages:
    """Hashes of the images to exclude.

    Attributes:
        hashes: One hash per image and margin.
        keys: Image keys, in the order of the hashes.
        max_distance: Maximum Hamming distance of a near-duplicate.
    """

    hashes: UInt64[NDArray[np.uint64], " hashes"]
    keys: tuple[str, ...]
    max_distance: int

    @property
    def fingerprint(self) -> str:
        """Digest of the hashes and ``max_distance``, which determine the matches."""
        return hashlib.sha256(self.hashes.tobytes() + bytes([self.max_distance])).hexdigest()

    def match(self, pixels: Pixels) -> str:
        """Return why an image is excluded, completing 'this sample …'; empty above ``max_distance``."""
        distances = np.bitwise_count(self.hashes ^ image_hash(pixels))
        best = int(distances.argmin())
        if distances[best] > self.max_distance:
            return ""
        image = self.keys[best // len(MARGINS)]
        return f"is nearly the image '{image}' ({distances[best]} of 64 bits differ)"


def margin_hashes(pixels: Pixels) -> list[np.uint64]:
    """Hash an image with each of `MARGINS` cut off."""
    height, width = pixels.shape[:2]
    cuts = [(int(margin * height), int(margin * width)) for margin in MARGINS]
    return [image_hash(pixels[rows : height - rows, columns : width - columns]) for rows, columns in cuts]


def image_hash(pixels: Pixels) -> np.uint64:
    """Hash an image: signs of its low DCT frequencies about their median, after resizing to a square."""
    small = resized(pixels, _SIDE, _SIDE).astype(np.float64) @ (0.299, 0.587, 0.114)
    cosines = _cosines()
    frequencies = (cosines @ small @ cosines.T).reshape(-1)
    # The first frequency is the mean brightness, with the same sign in every image; 63 carry information.
    bits = frequencies > np.median(frequencies[1:])
    return np.packbits(bits).view(">u8")[0].astype(np.uint64)


@functools.cache
def _cosines() -> Float64[NDArray[np.float64], "frequencies side"]:
    """Return the lowest rows of the discrete cosine transform."""
    phases = (np.arange(_SIDE) + 0.5) * np.pi / _SIDE
    return np.cos(np.arange(_FREQUENCIES)[:, None] * phases)
