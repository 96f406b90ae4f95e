"""The embedded set's exact reader: what is in a picture, decided from its pixels.

The nearest of all scenes in pixel space. A figure of colour c that covers share a of a pixel turns the
background b into b + a (c - b), so its squared distance to a picture x, compared with that of the bare
background, is ``-2 (c - b) . sum a (x - b) + |c - b|^2 sum a^2``: the distances to all scenes of one figure
follow from the products of x with the few coverages. Two figures never touch, so their gains add up.
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
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Figure,
    Scene,
    coverage,
)

_CHUNK = 256
"""Pictures read at once, which bounds the memory (a few megabytes per picture side of 64)."""

Pixels = Float64[NDArray[np.float64], "pictures 3 pixels"]
Gains = Float64[NDArray[np.float64], "pictures positions looks colours backgrounds"]


@dataclass(frozen=True)
class AlignmentScore:
    """How many attributes of the pictures are what their scenes say.

    Attributes:
        mean: Share of right attributes over all pictures and attributes.
        all: Share of pictures with every attribute right.
        per_attribute: Share of pictures in which an attribute is right, by its name.
    """

    mean: float
    all: float
    per_attribute: dict[str, float]


def attribute_accuracy(
    images: UInt8[Tensor, "pictures 3 height width"], scenes: Sequence[Scene]
) -> AlignmentScore:
    """Read every picture and compare it with the scene it should show.

    Args:
        images: RGB, square, values 0 to 255.
        scenes: The scene that each picture should show; all with the same number of figures.

    Raises:
        ValueError: There is no picture, or not one for each scene.
    """
    return alignment_score(attributes_right(images, scenes), scenes[0])


def attributes_right(
    images: UInt8[Tensor, "pictures 3 height width"], scenes: Sequence[Scene]
) -> Bool[NDArray[np.bool_], "pictures attributes"]:
    """Which attributes of each picture are what its scene says, in the order of `Scene.attributes`.

    Raises:
        ValueError: There is no picture, or not one for each scene.
    """
    if not scenes or len(images) != len(scenes):
        raise ValueError(f"{len(images)} pictures cannot be compared with {len(scenes)} scenes")
    found = read_scenes(images, objects=len(scenes[0].figures))
    wanted = [list(scene.attributes().values()) for scene in scenes]
    return np.array([list(scene.attributes().values()) for scene in found]) == np.array(wanted)


def alignment_score(right: Bool[NDArray[np.bool_], "pictures attributes"], scene: Scene) -> AlignmentScore:
    """What `attributes_right` found, summed up; ``scene`` is any of the scenes, for the attributes' names."""
    return AlignmentScore(
        mean=float(right.mean()),
        all=float(right.all(axis=1).mean()),
        per_attribute=dict(zip(scene.attributes(), right.mean(axis=0).tolist(), strict=True)),
    )


def chance_accuracy(
    images: UInt8[Tensor, "pictures 3 height width"], scenes: Sequence[Scene]
) -> AlignmentScore:
    """The score of the same pictures for each other's scenes: the chance level.

    Every picture gets another one's scene, along a fixed random cycle through all of them.

    Raises:
        ValueError: There are fewer than two pictures.
    """
    if len(scenes) < 2:
        raise ValueError("the chance level needs two pictures or more")
    cycle = permutation(0, Purpose.EVALUATION, 0, len(scenes)).tolist()
    followers = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return attribute_accuracy(images, [scenes[followers[picture]] for picture in range(len(scenes))])


def read_scenes(images: UInt8[Tensor, "pictures 3 height width"], objects: int) -> list[Scene]:
    """The nearest scene of each picture among all scenes with ``objects`` figures, in squared distance.

    Raises:
        ValueError: The pictures are not square.
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
    # The best figure at each position on each background: [pictures, positions, backgrounds].
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
        look, colour = divmod(int(which[list(POSITIONS).index(position), background]), len(COLOURS))
        shape, size = list(product(SHAPES, SIZES))[look]
        figures.append(Figure(shape, list(COLOURS)[colour], size, position))
    return Scene(list(BACKGROUNDS)[background], tuple(figures))


def _gains(pixels: Pixels, side: int) -> Gains:
    """By how much each figure on each background changes the squared distance that the background has."""
    covers = _coverages(side)
    backgrounds = np.array(list(BACKGROUNDS.values()), np.float64)
    steps = np.array(list(COLOURS.values()), np.float64)[:, None] - backgrounds
    picture_sums = pixels @ covers.T
    cover_sums, square_sums = covers.sum(axis=1), np.square(covers).sum(axis=1)
    # Indices: n picture, h channel, m coverage, c colour, b background.
    along = np.einsum("nhm,cbh->nmcb", picture_sums, steps, optimize=True)
    along -= np.einsum("m,bh,cbh->mcb", cover_sums, backgrounds, steps)
    across = np.einsum("m,cbh->mcb", square_sums, np.square(steps))
    return (across - 2 * along).reshape(len(pixels), len(POSITIONS), -1, len(COLOURS), len(BACKGROUNDS))


def _distances_to_backgrounds(pixels: Pixels) -> Float64[NDArray[np.float64], "pictures backgrounds"]:
    """Squared distance of each picture to each bare background, up to what is common to all of them."""
    backgrounds = np.array(list(BACKGROUNDS.values()), np.float64)
    return pixels.shape[2] * np.square(backgrounds).sum(axis=1) - 2 * pixels.sum(axis=2) @ backgrounds.T


@functools.cache
def _coverages(side: int) -> Float64[NDArray[np.float64], "coverages pixels"]:
    """Every figure's coverage of a picture: positions, then shapes, then sizes."""
    return np.stack(
        [
            coverage(shape, size, position, side).reshape(-1).astype(np.float64)
            for position, shape, size in product(POSITIONS, SHAPES, SIZES)
        ]
    )
