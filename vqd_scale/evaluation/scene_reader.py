"""Exact scene recognition for the embedded shapes dataset: nearest scene in pixel space.

A figure of color c that covers a fraction a of a pixel turns the background b into b + a (c - b). Relative to
the empty background, its squared distance to an image x changes by
``-2 (c - b) . sum a (x - b) + |c - b|^2 sum a^2``. The distances to all one-figure scenes therefore follow
from the products of x with the few coverage masks. Two figures never touch, so their changes add up.
"""

import functools
from collections.abc import Sequence
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

Pixels = Float64[NDArray[np.float64], "images 3 pixels"]
Gains = Float64[NDArray[np.float64], "images positions looks colors backgrounds"]


def correct_attributes(
    images: UInt8[Tensor, "images 3 height width"], scenes: Sequence[Scene]
) -> Bool[NDArray[np.bool_], "images attributes"]:
    """Return a mask of each image's correct attributes, in the order of `Scene.attributes`.

    Raises:
        ValueError: There are no images, or the numbers of images and scenes differ.
    """
    if not scenes or len(images) != len(scenes):
        raise ValueError(f"{len(images)} images cannot be compared with {len(scenes)} scenes")
    recognized = read_scenes(images, objects=len(scenes[0].figures))
    expected = [list(scene.attributes().values()) for scene in scenes]
    return np.array([list(scene.attributes().values()) for scene in recognized]) == np.array(expected)


def shuffled_scenes(scenes: Sequence[Scene]) -> list[Scene]:
    """Return the scene of another image for each image, along a fixed random cycle through all images.

    The accuracy with these scenes is the chance level.

    Raises:
        ValueError: There are fewer than two scenes.
    """
    if len(scenes) < 2:
        raise ValueError("the chance level needs two images or more")
    cycle = permutation(0, Purpose.EVALUATION, 0, len(scenes)).tolist()
    followers = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return [scenes[followers[number]] for number in range(len(scenes))]


def read_scenes(images: UInt8[Tensor, "images 3 height width"], objects: int) -> list[Scene]:
    """Return each image's nearest scene, in squared distance, among all scenes with ``objects`` figures.

    Raises:
        ValueError: The images are not square.
    """
    count, _, height, width = images.shape
    if height != width:
        raise ValueError(f"images of {height} x {width} pixels are not square, as scenes are")
    scenes: list[Scene] = []
    for first in range(0, count, _CHUNK):
        chunk = images[first : first + _CHUNK].cpu().numpy().astype(np.float64)
        scenes.extend(_nearest(chunk.reshape(len(chunk), 3, -1), height, objects))
    return scenes


def _nearest(pixels: Pixels, side: int, objects: int) -> list[Scene]:
    gains = _gains(pixels, side)
    backgrounds = _distances_to_backgrounds(pixels)
    placements = [(position,) for position in POSITIONS] if objects == 1 else list(RELATIONS.values())
    positions = list(POSITIONS)
    # Best figure at each position on each background: [images, positions, backgrounds].
    flat = gains.reshape(*gains.shape[:2], -1, len(BACKGROUNDS))
    best, best_figures = flat.min(axis=2), flat.argmin(axis=2)
    totals = np.stack(
        [
            backgrounds + sum(best[:, positions.index(position)] for position in placement)
            for placement in placements
        ],
        axis=1,
    )
    choices = totals.reshape(len(pixels), -1).argmin(axis=1)
    return [
        _scene(best_figures[row], choice % len(BACKGROUNDS), placements[choice // len(BACKGROUNDS)])
        for row, choice in enumerate(choices.tolist())
    ]


def _scene(
    best_figures: Int64[NDArray[np.int64], "positions backgrounds"], background: int, positions: Sequence[str]
) -> Scene:
    figures: list[Figure] = []
    for position in positions:
        look, color = divmod(int(best_figures[list(POSITIONS).index(position), background]), len(COLORS))
        shape, size = list(product(SHAPES, SIZES))[look]
        figures.append(Figure(shape, list(COLORS)[color], size, position))
    return Scene(list(BACKGROUNDS)[background], tuple(figures))


def _gains(pixels: Pixels, side: int) -> Gains:
    """Compute the change of an empty background's squared distance by each figure on each background."""
    covers = _coverages(side)
    backgrounds = np.array(list(BACKGROUNDS.values()), np.float64)
    steps = np.array(list(COLORS.values()), np.float64)[:, None] - backgrounds
    image_sums = pixels @ covers.T
    cover_sums, square_sums = covers.sum(axis=1), np.square(covers).sum(axis=1)
    # Indices: n image, h channel, m coverage, c color, b background.
    along = np.einsum("nhm,cbh->nmcb", image_sums, steps, optimize=True)
    along -= np.einsum("m,bh,cbh->mcb", cover_sums, backgrounds, steps)
    across = np.einsum("m,cbh->mcb", square_sums, np.square(steps))
    return (across - 2 * along).reshape(len(pixels), len(POSITIONS), -1, len(COLORS), len(BACKGROUNDS))


def _distances_to_backgrounds(pixels: Pixels) -> Float64[NDArray[np.float64], "images backgrounds"]:
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
