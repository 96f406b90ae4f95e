"""Exact scene recognition for the embedded shapes dataset: nearest scene in pixel space.

A figure of color c that covers a fraction a of a pixel turns the background b into b + a (c - b). Relative to
the empty background, its squared distance to an image x changes by
``-2 (c - b) . sum a (x - b) + |c - b|^2 sum a^2``. The distances to all one-figure scenes therefore follow
from the products of x with the few coverage masks. Two figures never touch, so their changes add up.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.sources.shapes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Figure,
    Scene,
    coverage,
)

_CHUNK = 256
"""Images per chunk, to bound memory (a few megabytes at an image side of 64)."""

Pixels = Float64[NDArray[np.float64], "pictures 3 pixels"]
Gains = Float64[NDArray[np.float64], "pictures positions looks colors backgrounds"]


@dataclass(frozen=True)
class AlignmentScore:
    """Accuracy of the attributes in images, compared with their scenes.

    Attributes:
        mean: Fraction of correct attributes over all images and attributes.
        all: Fraction of images with all attributes correct.
        per_attribute: Fraction of images with the attribute correct, by attribute name.
    """

    mean: float
    all: float
    per_attribute: dict[str, float]


def attribute_accuracy(
    images: UInt8[Tensor, "pictures 3 height width"], scenes: Sequence[Scene]
) -> AlignmentScore:
    """Recognize the scene in every image and compare it with the expected scene.

    Args:
        images: Square RGB images, values 0 to 255.
        scenes: Expected scene of each image, all with the same number of figures.

    Raises:
        ValueError: There are no images, or the numbers of images and scenes differ.
    """
    return alignment_score(attributes_right(images, scenes), scenes[0])


def attributes_right(
    images: UInt8[Tensor, "pictures 3 height width"], scenes: Sequence[Scene]
) -> Bool[NDArray[np.bool_], "pictures attributes"]:
    """Return a mask of each image's correct attributes, in the order of `Scene.attributes`.

    Raises:
        ValueError: There are no images, or the numbers of images and scenes differ.
    """
    if not scenes or len(images) != len(scenes):
        raise ValueError(f"{len(images)} pictures cannot be compared with {len(scenes)} scenes")
    found = read_scenes(images, objects=len(scenes[0].figures))
    wanted = [list(scene.attributes().values()) for scene in scenes]
    return np.array([list(scene.attributes().values()) for scene in found]) == np.array(wanted)


def alignment_score(right: Bool[NDArray[np.bool_], "pictures attributes"], scene: Scene) -> AlignmentScore:
    """Summarize the result of `attributes_right`; any ``scene`` of the set supplies the attribute names."""
    return AlignmentScore(
        mean=float(right.mean()),
        all=float(right.all(axis=1).mean()),
        per_attribute=dict(zip(scene.attributes(), right.mean(axis=0).tolist(), strict=True)),
    )


def chance_accuracy(
    images: UInt8[Tensor, "pictures 3 height width"], scenes: Sequence[Scene]
) -> AlignmentScore:
    """Compute the chance level: the score of the images with shuffled scenes.

    Every image gets the scene of another image, along a fixed random cycle through all images.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(scenes) < 2:
        raise ValueError("the chance level needs two pictures or more")
    cycle = permutation(0, Purpose.EVALUATION, 0, len(scenes)).tolist()
    followers = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return attribute_accuracy(images, [scenes[followers[picture]] for picture in range(len(scenes))])


def read_scenes(images: UInt8[Tensor, "pictures 3 height width"], objects: int) -> list[Scene]:
    """Return each image's nearest scene, in squared distance, among all scenes with ``objects`` figures.

    Raises:
        ValueError: The images are not square.
    """
    pictures, _, height, width = images.shape
    if height != width:
        raise ValueError(f"pictures of {height} x {width} pixels are not square, as scenes are")
    found: list[Scene] = []
    for first in range(0, pictures, _CHUNK):
        chunk = images[first : first + _CHUNK].cpu().numpy().astype(np.float64)
        found.extend(_nearest(chunk.reshape(len(chunk), 3, -1), height, objects))
    return found


def _nearest(pixels: Pixels, side: int, objects: int) -> list[Scene]:
    gains = _gains(pixels, side)
    backgrounds = _distances_to_backgrounds(pixels)
    placements = [(position,) for position in POSITIONS] if objects == 1 else list(RELATIONS.values())
    positions = list(POSITIONS)
    # Best figure at each position on each background: [pictures, positions, backgrounds].
    flat = gains.reshape(*gains.shape[:2], -1, len(BACKGROUNDS))
    best, which = flat.min(axis=2), flat.argmin(axis=2)
    totals = np.stack(
        [
            backgrounds + sum(best[:, positions.index(position)] for position in places)
            for places in placements
        ],
        axis=1,
    )
    chosen = totals.reshape(len(pixels), -1).argmin(axis=1)
    return [
        _scene(which[picture], choice % len(BACKGROUNDS), placements[choice // len(BACKGROUNDS)])
        for picture, choice in enumerate(chosen.tolist())
    ]


def _scene(
    which: Int64[NDArray[np.int64], "positions backgrounds"], background: int, positions: Sequence[str]
) -> Scene:
    figures: list[Figure] = []
    for position in positions:
        look, color = divmod(int(which[list(POSITIONS).index(position), background]), len(COLORS))
        shape, size = list(product(SHAPES, SIZES))[look]
        figures.append(Figure(shape, list(COLORS)[color], size, position))
    return Scene(list(BACKGROUNDS)[background], tuple(figures))


def _gains(pixels: Pixels, side: int) -> Gains:
    """Compute the change of an empty background's squared distance by each figure on each background."""
    covers = _coverages(side)
    backgrounds = np.array(list(BACKGROUNDS.values()), np.float64)
    steps = np.array(list(COLORS.values()), np.float64)[:, None] - backgrounds
    picture_sums = pixels @ covers.T
    cover_sums, square_sums = covers.sum(axis=1), np.square(covers).sum(axis=1)
    # Indices: n image, h channel, m coverage, c color, b background.
    along = np.einsum("nhm,cbh->nmcb", picture_sums, steps, optimize=True)
    along -= np.einsum("m,bh,cbh->mcb", cover_sums, backgrounds, steps)
    across = np.einsum("m,cbh->mcb", square_sums, np.square(steps))
    return (across - 2 * along).reshape(len(pixels), len(POSITIONS), -1, len(COLORS), len(BACKGROUNDS))


def _distances_to_backgrounds(pixels: Pixels) -> Float64[NDArray[np.float64], "pictures backgrounds"]:
    """Compute each image's squared distance to each empty background, up to a constant per image."""
    backgrounds = np.array(list(BACKGROUNDS.values()), np.float64)
    return pixels.shape[2] * np.square(backgrounds).sum(axis=1) - 2 * pixels.sum(axis=2) @ backgrounds.T


@functools.cache
def _coverages(side: int) -> Float64[NDArray[np.float64], "coverages pixels"]:
    """Compute the coverage mask of every figure, ordered by position, then shape, then size."""
    return np.stack(
        [
            coverage(shape, size, position, side).reshape(-1).astype(np.float64)
            for position, shape, size in product(POSITIONS, SHAPES, SIZES)
        ]
    )
