from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_scale.data.shards.decode import Pixels

Place = Callable[..., Path]


def photograph(number: int, height: int = 40, width: int = 60) -> Pixels:
    """Return an image of waves of many lengths and colors with grain, determined by its number."""
    rng = np.random.default_rng(number)
    places = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    colors = np.full((height, width, 3), 128.0)
    for _ in range(12):
        wave = np.sin(2 * np.pi * (places * rng.uniform(-4, 4, (2, 1, 1))).sum(axis=0) + rng.uniform(0, 6))
        colors += wave[..., None] * rng.normal(0, 20, 3)
    return (colors + rng.normal(0, 4, colors.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def image_writer() -> Place:
    """Return a function that writes an image file and its folders."""

    def write_image(path: Path, number: int = 0, height: int = 40, width: int = 60) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(number, height, width)).save(path)
        return path

    return write_image
