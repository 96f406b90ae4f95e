from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_scale.data.shards.decode import Pixels

Place = Callable[..., Path]


def photograph(number: int, height: int = 40, width: int = 60) -> Pixels:
    """Waves of many lengths and colours with grain; another number is another picture."""
    rng = np.random.default_rng(number)
    places = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    colours = np.full((height, width, 3), 128.0)
    for _ in range(12):
        wave = np.sin(2 * np.pi * (places * rng.uniform(-4, 4, (2, 1, 1))).sum(axis=0) + rng.uniform(0, 6))
        colours += wave[..., None] * rng.normal(0, 20, 3)
    return (colours + rng.normal(0, 4, colours.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def place() -> Place:
    """Puts a picture into a file, with its folders."""

    def put(path: Path, number: int = 0, height: int = 40, width: int = 60) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(number, height, width)).save(path)
        return path

    return put
