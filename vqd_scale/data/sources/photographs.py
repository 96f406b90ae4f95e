"""Photographs bundled with scikit-learn and scikit-image: real images without a download."""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, integers
from vqd_scale.data.shards.decode import Pixels, decode_image
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, shard_recipes, write_shard_set

_FOLDERS = {"sklearn": Path("datasets") / "images", "skimage": Path("data")}
_NAMES = {
    "sklearn": ("china.jpg", "flower.jpg"),
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
}
_TEXT = "a photograph"


class PhotographsConfig(Config):
    """Dataset of crops of a few photographs."""

    held_out: str = "chelsea"
    """Name of the photograph for validation; no training crop is taken from it. Change it for
    cross-validation."""
    size: int = Field(default=64, ge=8, le=4096)
    """Side of the crops in pixels, at the photographs' original scale."""
    train_samples: int = Field(default=8192, ge=1, le=1 << 24)
    """Number of random crops of the other photographs. Lower it for a quick test."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the crop positions."""
    samples_per_shard: int = Field(default=2048, ge=1, le=1 << 20)
    """Images per shard. Lower it for several shards of a small dataset."""


def photographs() -> dict[str, Path]:
    """Return the photographs of the installed packages by name; at least scikit-learn's two."""
    paths: dict[str, Path] = {}
    for package, names in _NAMES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(spec.submodule_search_locations[0]) / _FOLDERS[package]
            paths |= {Path(name).stem: folder / name for name in names if (folder / name).is_file()}
    return paths


def write_photographs(config: PhotographsConfig, folder: Path) -> dict[str, ShardSet]:
    """Write random crops to ``folder/train`` and all tiles of one photograph to ``folder/held_out``.

    Raises:
        UserError: The photograph does not exist, or a folder contains another dataset or cannot be written.
    """
    paths = photographs()
    if config.held_out not in paths or len(paths) < 2:
        raise UserError(
            f"held_out: there is no photograph '{config.held_out}' among {', '.join(sorted(paths))}; choose "
            f"one of these, or install scikit-image, which brings five."
        )
    train_photographs = [paths[name] for name in sorted(paths) if name != config.held_out]
    meta = {"content": "images", "source": {"name": "photographs", **config.model_dump(mode="json")}}
    names = {"photographs": [path.stem for path in train_photographs]}
    crops = functools.partial(_crops, config, train_photographs)
    train = shard_recipes(range(config.train_samples), config.samples_per_shard, crops)
    tiles = list(_tiles(config, paths[config.held_out]))
    held_out = shard_recipes(tiles, max(1, len(tiles)), iter)
    return {
        "train": write_shard_set(folder / "train", {**meta, **names}, train, "photographs"),
        "held_out": write_shard_set(folder / "held_out", meta, held_out, "held-out photograph"),
    }


def _crops(config: PhotographsConfig, photographs: list[Path], numbers: Sequence[int]) -> Iterator[Sample]:
    images = [decode_image(path.read_bytes()) for path in photographs]
    areas = np.array([pixels.shape[0] * pixels.shape[1] for pixels in images])
    ends = areas.cumsum()
    for number in numbers:
        area, *corner = (integers(config.seed, Purpose.PHOTOGRAPH, number, 3) * 2.0**-32).tolist()
        # Photographs are sampled in proportion to their area, so all pixels are about equally likely.
        pixels = images[int(np.searchsorted(ends, area * ends[-1], side="right"))]
        row, column = (
            int(uniform * (side - config.size + 1))
            for uniform, side in zip(corner, pixels.shape[:2], strict=True)
        )
        yield _sample(f"{number:08d}", pixels[row : row + config.size, column : column + config.size])


def _tiles(config: PhotographsConfig, photograph: Path) -> Iterator[Sample]:
    pixels, size = decode_image(photograph.read_bytes()), config.size
    for row in range(0, pixels.shape[0] - size + 1, size):
        for column in range(0, pixels.shape[1] - size + 1, size):
            yield _sample(f"{row:05d}-{column:05d}", pixels[row : row + size, column : column + size])


def _sample(key: str, pixels: Pixels) -> Sample:
    return {KEY: key, "png": np.ascontiguousarray(pixels), "txt": _TEXT}
