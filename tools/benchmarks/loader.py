"""The loader beside webdataset's ordinary pipeline with Pillow, on the same shards."""

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
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.loading.stream import Stream, StreamConfig
from vqd_scale.data.shards.decode import DecodeConfig, Pixels
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, shard_name, write_shard_set
from vqd_scale.data.transforms import CenterCrop

Side = Callable[[Path], Iterator[tuple[list[str], NDArray[np.uint8]]]]
"""From a folder of shards to batches of keys and pictures [batch, height, width, 3], one epoch."""

LARGEST_DIFFERENCE = 2
"""By so many levels a pixel of ours may differ from Pillow's."""


@dataclass(frozen=True)
class PictureProblem:
    """What is read: square JPEGs that look like photographs to a codec.

    Attributes:
        pictures: How many.
        side: Their height and width in the shards.
        size: Height and width for the network.
        batch: How many are put together.
    """

    pictures: int = 384
    side: int = 512
    size: int = 256
    batch: int = 32

    def write(self, folder: Path) -> ShardSet:
        """Write the shards."""
        shards, rest = divmod(self.pictures, 4)
        counts = [shards + (number < rest) for number in range(4)]
        ends = list(itertools.accumulate(counts))
        recipes = [
            ShardRecipe(shard_name(number), count, functools.partial(self._samples, range(end - count, end)))
            for number, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
        return write_shard_set(folder, {"content": "images"}, recipes, "writing pictures")

    def _samples(self, numbers: range) -> Iterator[Sample]:
        for number in numbers:
            with io.BytesIO() as file:
                Image.fromarray(self._picture(number)).save(file, "JPEG", quality=90)
                yield {KEY: f"{number:06d}", "jpg": file.getvalue(), "txt": f"picture {number}"}

    def _picture(self, number: int) -> Pixels:
        """Waves of all lengths, the short ones weaker, as photographs have them."""
        waves = np.arange(1, 25)
        words = integers(0, Purpose.EVALUATION, number, 24 * 6).reshape(24, 6) / 2**32
        y, x = 2 * np.pi * waves**1.5 * (words[:, :2].T - 0.5)
        strengths = 60 / waves**0.5 * (words[:, 3:].T - 0.3)
        places = np.arange(self.side)[:, None] / self.side
        rows = np.concatenate([np.sin(places * y), np.cos(places * y)], axis=1)
        angles = places * x + 2 * np.pi * words[:, 2]
        columns = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        # The sine of a sum: a wave in any direction is two products of waves along the sides.
        colours = [128 + (rows * np.tile(strength, 2)) @ columns.T for strength in strengths]
        return np.stack(colours, axis=-1).clip(0, 255).astype(np.uint8)


def ours(problem: PictureProblem, *, dct_scaled: bool = False) -> Side:
    """Our stream, its one reader in a thread of this process."""

    def batches(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        config = StreamConfig(path=folder, global_batch_size=problem.batch)
        kind = ImageSamples(CenterCrop(size=problem.size), decode=DecodeConfig(dct_scaled=dct_scaled))
        stream: Stream[ImageBatch] = Stream(
            config, kind, seed=0, rank=0, ranks=1, cursor=0, quarantine=folder / "quarantine.jsonl"
        )
        with closing(iter(stream)) as read:
            for batch in itertools.islice(read, -(-problem.pictures // problem.batch)):
                yield batch.keys, batch.images.permute(0, 2, 3, 1).numpy()

    return batches


def alternative(problem: PictureProblem) -> Side:
    """The ordinary pipeline of webdataset with Pillow, in this process."""

    def batches(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        tars = sorted(folder.glob("*.tar"))
        for keys, pictures, _ in plain_batches(tars, problem.size, problem.batch):
            yield keys, pictures

    return batches


def benchmark_loader(rounds: int) -> dict[str, Any]:
    """One epoch of pictures on the same shards, one core for each side; seconds for a thousand pictures.

    And token samples a second, put together with caption ids and keys; see `token_figures`.

    Before anything is measured both sides must give the same pictures, to `LARGEST_DIFFERENCE` levels.
    Unpacking JPEGs at a fraction of their size is a row of its own: it makes other pictures.

    Args:
        rounds: How often each side is timed, in turn; the median counts.

    Raises:
        ValueError: The pictures differ by more, or a token sample is not what was written.
    """
    tokens = token_figures(rounds, TokenProblem())
    return picture_figures(rounds, PictureProblem()) | tokens


def picture_figures(rounds: int, problem: PictureProblem) -> dict[str, Any]:
    """The figures of pictures; see `benchmark_loader`."""
    torch.set_num_threads(1)
    sides = {
        "ours": ours(problem),
        "alternative": alternative(problem),
        "dct_scaled": ours(problem, dct_scaled=True),
    }
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as temporary:
        folder = Path(temporary)
        problem.write(folder)
        differences = compared_pictures(sides, folder)
        memory = {
            name: in_fresh_process(functools.partial(_epoch_peak, problem, name, folder))
            for name in ("ours", "alternative")
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in progress(range(rounds), "pictures", rounds):
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
        "shape": [problem.pictures, problem.side, problem.size],
    }


def compared_pictures(sides: Mapping[str, Side], folder: Path) -> dict[str, dict[str, float]]:
    """By how many levels each side's pixels differ from the alternative's, at most and on average.

    Raises:
        ValueError: Ours differ by more than `LARGEST_DIFFERENCE`, or a side lacks pictures.
    """
    pictures = {
        name: {key: picture for keys, batch in side(folder) for key, picture in zip(keys, batch, strict=True)}
        for name, side in sides.items()
    }
    expected = pictures.pop("alternative")
    found: dict[str, dict[str, float]] = {}
    for name, given in pictures.items():
        if given.keys() != expected.keys():
            raise ValueError(f"{name}: {len(given)} pictures, not the {len(expected)} of the alternative")
        apart = [np.abs(given[key].astype(np.int16) - expected[key]) for key in expected]
        found[name] = {
            "max": float(max(levels.max() for levels in apart)),
            "mean": round(float(np.mean([levels.mean() for levels in apart])), 4),
        }
    if found["ours"]["max"] > LARGEST_DIFFERENCE:
        raise ValueError(f"pixels differ by up to {found['ours']['max']:.0f} levels")
    return found


def _epoch_peak(problem: PictureProblem, name: str, folder: Path) -> int:
    """How far an epoch raises resident memory, the libraries it needs included."""
    side = ours(problem) if name == "ours" else alternative(problem)

    def epoch() -> None:
        for _ in side(folder):
            pass

    return extra_peak(epoch)
