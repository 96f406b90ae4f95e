"""Image transforms to the network's square input; random numbers are passed as arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from vqd_scale.core.config import Config, kind_or

if TYPE_CHECKING:
    from vqd_scale.data.shards.decode import Pixels


_MAX_ASPECT = 16
"""Largest ratio of the longer to the shorter side that is resized whole; longer images are cut first."""


class CenterCrop(Config):
    """Resize of the short side to ``size`` and center crop, as used in evaluation."""

    kind: Literal["center"] = "center"
    size: int = Field(default=256, ge=1, le=1 << 14)
    """Height and width of the result in pixels."""

    draws: ClassVar[int] = 0
    """Number of uniform random numbers per image."""

    @property
    def smallest_side(self) -> int:
        """Sufficient shorter side of the input in pixels; a larger image adds no detail."""
        return self.size

    def __call__(self, pixels: Pixels, uniforms: Sequence[float]) -> Pixels:
        """Return the center crop; ``uniforms`` is unused."""
        del uniforms
        return fitted(pixels, self.size)


class NearCenterCrop(Config):
    """Training crop of the released VQ-Diffusion code: near-center, slightly zoomed, no horizontal flip.

    The largest square is cut at a random offset, between 3/8 and 5/8 of the slack along the longer side, and
    resized to a random side between ``size`` and 9/8 ``size`` (at most its own side if that is larger than
    ``size``). A random ``size`` square is cut from the result. There is no flip because captions contain
    "left" and "right".
    """

    kind: Literal["near_center"] = "near_center"
    size: int = Field(default=256, ge=1, le=1 << 14)
    """Height and width of the result in pixels."""

    draws: ClassVar[int] = 5
    """Number of uniform random numbers per image."""

    @property
    def smallest_side(self) -> int:
        """Sufficient shorter side of the input in pixels; a larger image adds no detail."""
        return round(9 / 8 * self.size)

    def __call__(self, pixels: Pixels, uniforms: Sequence[float]) -> Pixels:
        """Return the crop for five numbers in [0, 1): square offsets (2), resized side, crop offsets (2)."""
        height, width = pixels.shape[:2]
        square = min(height, width)
        row, column = (
            _integer(number, 3 * room // 8, max(3 * room // 8 + 1, 5 * room // 8))
            for number, room in zip(uniforms, (height - square, width - square), strict=False)
        )
        largest = max(self.size, min(square, self.smallest_side))
        side = _integer(uniforms[2], self.size, largest + 1)
        zoomed = resized(pixels[row : row + square, column : column + square], side, side)
        y, x = (_integer(number, 0, side - self.size + 1) for number in uniforms[3:5])
        return zoomed[y : y + self.size, x : x + self.size]


class RandomResizedCrop(Config):
    """Crop of random area and aspect ratio, resized to a square (Szegedy et al., 2014)."""

    kind: Literal["random_resized"] = "random_resized"
    size: int = Field(default=256, ge=1, le=1 << 14)
    """Height and width of the result in pixels."""
    scale: tuple[float, float] = (0.8, 1.0)
    """Minimum and maximum crop area, as a fraction of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum aspect ratio (width / height) of the crop. (1, 1) avoids distortion."""

    tries: ClassVar[int] = 10
    draws: ClassVar[int] = 2 * tries + 2
    """Number of uniform random numbers per image."""

    @property
    def smallest_side(self) -> int:
        """Sufficient shorter side of the input in pixels; a larger image adds no detail."""
        return math.ceil(self.size / math.sqrt(self.scale[0] * self.ratio[0]))

    def __call__(self, pixels: Pixels, uniforms: Sequence[float]) -> Pixels:
        """Return the crop for numbers in [0, 1); the center crop if none of the ``tries`` fits the image."""
        height, width = pixels.shape[:2]
        low, high = self.scale
        narrow, wide = (math.log(ratio) for ratio in self.ratio)
        numbers = uniforms[: 2 * self.tries]
        for area, shape in zip(numbers[0::2], numbers[1::2], strict=True):
            covered = height * width * (low + area * (high - low))
            ratio = math.exp(narrow + shape * (wide - narrow))
            rows, columns = round(math.sqrt(covered / ratio)), round(math.sqrt(covered * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                row, column = (
                    _integer(number, 0, room + 1)
                    for number, room in zip(uniforms[-2:], (height - rows, width - columns), strict=True)
                )
                return resized(pixels[row : row + rows, column : column + columns], self.size, self.size)
        return fitted(pixels, self.size)


Transform = Annotated[
    Annotated[CenterCrop, Tag("center")]
    | Annotated[NearCenterCrop, Tag("near_center")]
    | Annotated[RandomResizedCrop, Tag("random_resized")],
    Discriminator(kind_or("center")),
]
"""Transform from an image to the network's square input."""


def fitted(pixels: Pixels, size: int) -> Pixels:
    """Resize the short side to ``size`` and cut the center square."""
    short = min(pixels.shape[:2])
    # Otherwise 1 x 65,000 pixels would be resized to 256 x 16,640,000.
    row, column = (max(0, side - _MAX_ASPECT * short) // 2 for side in pixels.shape[:2])
    pixels = pixels[row : row + _MAX_ASPECT * short, column : column + _MAX_ASPECT * short]
    height, width = pixels.shape[:2]
    zoomed = resized(pixels, size * height // short, size * width // short)
    row, column = (round((side - size) / 2) for side in zoomed.shape[:2])
    return zoomed[row : row + size, column : column + size]


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize, bicubic and anti-aliased, three times as fast as Pillow and within two levels of it.

    Both round to bytes between the row pass and the column pass. For images much taller than wide, Pillow
    resizes the columns first, and the sharpest edges can differ by more than two levels.
    """
    import numpy as np
    import torch
    from torch.nn import functional

    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized_planes = functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized_planes[0].permute(1, 2, 0).numpy()


def _integer(uniform: float, low: int, high: int) -> int:
    """Map a uniform number to an integer from ``low`` to ``high - 1``."""
    return low + int(uniform * (high - low))
