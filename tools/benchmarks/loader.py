"""The loader against webdataset's standard pipeline with Pillow, on the same shards."""

import functools
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.measuring import extra_peak, in_fresh_process
from benchmarks.tokens import TokenProblem, token_figures
from benchmarks.webdataset_baseline import plain_batches
from PIL import Image

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.progress import progress
from vqd_scale.core.rng import Purpose, integers
from vqd_scale.data.config import DecodeConfig, StreamConfig
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.decode import Pixels
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, shard_name, write_shard_set
from vqd_scale.data.transforms import CenterCrop

Side = Callable[[Path], Iterator[tuple[list[str], NDArray[np.uint8]]]]
"""Function from a folder of shards to one epoch of batches: keys and images [batch, height, width, 3]."""

LARGEST_DIFFERENCE = 2
"""Maximum difference of a pixel from Pillow's, in levels."""


@dataclass(frozen=True)
class ImageProblem:
    """Dataset of square JPEGs that compress as photographs do.

    Attributes:
        images: Number of images.
        side: Height and width in the shards.
        size: Height and width for the network.
        batch: Images per batch.
    """

    images: int = 384
    side: int = 512
    size: int = 256
    batch: int = 32

    def write(self, folder: Path) -> ShardSet:
        """Write the shards."""
        shards, remainder = divmod(self.images, 4)
        counts = [shards + (number < remainder) for number in range(4)]
        ends = list(itertools.accumulate(counts))
        recipes = [
            ShardRecipe(shard_name(number), count, functools.partial(self._samples, range(end - count, end)))
            for number, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
        return write_shard_set(folder, {"content": "images"}, recipes, "writing images")

    def _samples(self, numbers: range) -> Iterator[Sample]:
        for number in numbers:
            with io.BytesIO() as file:
                Image.fromarray(self._image(number)).save(file, "JPEG", quality=90)
                yield {KEY: f"{number:06d}", "jpg": file.getvalue(), "txt": f"picture {number}"}

    def _image(self, number: int) -> Pixels:
        """Return an image of waves of all lengths, the short ones weaker, as in photographs."""
        waves = np.arange(1, 25)
        words = integers(0, Purpose.EVALUATION, number, 24 * 6).reshape(24, 6) / 2**32
        y, x = 2 * np.pi * waves**1.5 * (words[:, :2].T - 0.5)
        strengths = 60 / waves**0.5 * (words[:, 3:].T - 0.3)
        places = np.arange(self.side)[:, None] / self.side
        rows = np.concatenate([np.sin(places * y), np.cos(places * y)], axis=1)
        angles = places * x + 2 * np.pi * words[:, 2]
        columns = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        # Sine of a sum: a wave in any direction is two products of waves along the sides.
        colors = [128 + (rows * np.tile(strength, 2)) @ columns.T for strength in strengths]
        return np.stack(colors, axis=-1).clip(0, 255).astype(np.uint8)


def package_reader(problem: ImageProblem, *, dct_scaled: bool = False) -> Side:
    """Return the package's stream with its reader in a thread of this process."""

    def batches(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        config = StreamConfig(path=folder, global_batch_size=problem.batch)
        kind = ImageSamples(CenterCrop(size=problem.size), decode=DecodeConfig(dct_scaled=dct_scaled))
        stream: Stream[ImageBatch] = Stream(
            config, kind, seed=0, rank=0, ranks=1, cursor=0, quarantine=folder / "quarantine.jsonl"
        )
        with closing(iter(stream)) as opened_stream:
            for batch in itertools.islice(opened_stream, -(-problem.images // problem.batch)):
                yield batch.keys, batch.images.permute(0, 2, 3, 1).numpy()

    return batches


def alternative(problem: ImageProblem) -> Side:
    """Return webdataset's standard pipeline with Pillow, in this process."""

    def batches(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        tars = sorted(folder.glob("*.tar"))
        for keys, images, _ in plain_batches(tars, problem.size, problem.batch):
            yield keys, images

    return batches


def benchmark_loader(rounds: int) -> dict[str, Any]:
    """Measure seconds per thousand images over one epoch of the same shards, on one core per side.

    Token samples per second are measured as well, see `token_figures`.

    Both sides must first return equal images, up to `LARGEST_DIFFERENCE` levels. Decoding JPEGs at a fraction
    of their size has its own row, because its images differ.

    Args:
        rounds: Number of timings per side, in turn; the median is reported.

    Raises:
        ValueError: The images differ by more, or a token sample differs from the written one.
    """
    tokens = token_figures(rounds, TokenProblem())
    return image_figures(rounds, ImageProblem()) | tokens


def image_figures(rounds: int, problem: ImageProblem) -> dict[str, Any]:
    """Return the figures of images; see `benchmark_loader`."""
    torch.set_num_threads(1)
    sides = {
        "ours": package_reader(problem),
        "alternative": alternative(problem),
        "dct_scaled": package_reader(problem, dct_scaled=True),
    }
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as temporary:
        folder = Path(temporary)
        problem.write(folder)
        differences = compare_images(sides, folder)
        memory = {
            name: in_fresh_process(functools.partial(_epoch_peak, problem, name, folder))
            for name in ("ours", "alternative")
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in progress(range(rounds), "images", rounds):
            for name, side in sides.items():
                started = time.perf_counter()
                count = sum(len(keys) for keys, _ in side(folder))
                seconds[name].append((time.perf_counter() - started) / count * 1000)
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {name: medians["alternative"] / medians[name] for name in ("ours", "dct_scaled")}
    return {
        "ours": medians["ours"],
        "alternative": medians["alternative"],
        "ratio": ratios["ours"],
        "memory_ratio": memory["ours"] / memory["alternative"],
        "image_ratio": ratios["ours"],
        "images_per_second": {name: round(1000 / value, 1) for name, value in medians.items()},
        "difference": differences,
        "dct_scaled_ratio": ratios["dct_scaled"],
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "shape": [problem.images, problem.side, problem.size],
    }


def compare_images(sides: Mapping[str, Side], folder: Path) -> dict[str, dict[str, float]]:
    """Return the largest and mean difference of each side's pixels from the alternative's, in levels.

    Raises:
        ValueError: A package image differs by more than `LARGEST_DIFFERENCE`, or a side lacks images.
    """
    images_by_side = {
        name: {key: image for keys, batch in side(folder) for key, image in zip(keys, batch, strict=True)}
        for name, side in sides.items()
    }
    expected = images_by_side.pop("alternative")
    differences: dict[str, dict[str, float]] = {}
    for name, side_images in images_by_side.items():
        if side_images.keys() != expected.keys():
            raise ValueError(f"{name}: {len(side_images)} images, not the {len(expected)} of the alternative")
        apart = [np.abs(side_images[key].astype(np.int16) - expected[key]) for key in expected]
        differences[name] = {
            "max": float(max(levels.max() for levels in apart)),
            "mean": round(float(np.mean([levels.mean() for levels in apart])), 4),
        }
    if differences["ours"]["max"] > LARGEST_DIFFERENCE:
        raise ValueError(f"pixels differ by up to {differences['ours']['max']:.0f} levels")
    return differences


def _epoch_peak(problem: ImageProblem, name: str, folder: Path) -> int:
    """Return the increase of resident memory in an epoch, including the libraries it needs."""
    side = package_reader(problem) if name == "ours" else alternative(problem)

    def epoch() -> None:
        for _ in side(folder):
            pass

    return extra_peak(epoch)
