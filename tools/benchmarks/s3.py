"""Shards read from S3, as bytes and as samples, beside plain GETs and s3fs's own readers of the same shards.

The plain side is one GET per shard over HTTP, which keeps no bytes: the lower bound for any client. If the
store runs on the machine that reads, both share its processors, and the times include the store's.
"""

import hashlib
import itertools
import os
import statistics
import tarfile
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.measuring import extra_peak, in_fresh_process
from torch import Tensor

from vqd_scale.core import atomic_io as store
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.core.s3 import PIECE_BYTES, PIECES_AHEAD, S3Path
from vqd_scale.core.s3_client import Response, client_of
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import Batch
from vqd_scale.data.loading.sample_readers import Columns, SampleLocation, Slots
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard, shard_name, write_shard_set

_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class S3Problem:
    """A set of shards; by default four of 66 MB, as full of images as those of public sets."""

    shards: int = 4
    samples: int = 640
    image_bytes: int = 100_000
    lanes: int = 16
    shuffle_window: int = 64


def benchmark_s3(rounds: int, problem: S3Problem | None = None) -> dict[str, Any]:
    """Read a set: its bytes, its samples in their order and in that of training; its bytes by plain GETs.

    Args:
        rounds: How often each side is timed, in turn; the median counts.
        problem: The sizes.

    Raises:
        UserError: No store is named.
    """
    problem = S3Problem() if problem is None else problem
    if "AWS_ENDPOINT_URL" not in os.environ:
        raise UserError(
            "s3: set AWS_ENDPOINT_URL and keys for a store in which a bucket may be made; for one on this "
            "machine: python -m tests.s3.ceph python tools/benchmark.py s3"
        )
    folder = S3Path(f"vqd-scale-benchmark-{uuid.uuid4()}", "set")
    _call(folder, "create_bucket", Bucket=folder.bucket)
    try:
        return _measured(rounds, problem, write_problem(problem, folder))
    finally:
        _delete_bucket(folder)


def read_bytes(problem: S3Problem, shards: ShardSet) -> int:
    """Read every shard from its first byte to its last, as hashing, indexing and the cache do."""
    del problem
    return sum(len(block) for path in _paths(shards) for block in store.read_in_order(path))


def read_in_order(problem: S3Problem, shards: ShardSet) -> int:
    """Read every member of every sample, shard by shard, and return the number of bytes."""
    del problem
    samples = (sample for shard in shards.shards for sample in read_shard(shard))
    return sum(len(member) for sample in samples for member in _bytes(sample))


def read_in_lanes(problem: S3Problem, shards: ShardSet) -> int:
    """Read one epoch of global batches in training order, and return the number of bytes."""
    config = StreamConfig(
        path=shards.folder, global_batch_size=problem.lanes, shuffle_window=problem.shuffle_window
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "quarantine.jsonl"
        stream = Stream(config, _RawSamples(), seed=0, rank=0, ranks=1, cursor=0, quarantine=report)
        with closing(iter(stream)) as batches:
            parts = itertools.islice(batches, shards.count // problem.lanes)
            return sum(int(batch.sizes.sum()) for batch in parts)


def read_plainly(problem: S3Problem, shards: ShardSet) -> int:
    """GET every shard in turn without keeping its bytes, and return their number."""
    del problem
    total = 0
    for url in _urls(shards):
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - the store's own address
            while block := answer.read(_READ_AT_ONCE):
                total += len(block)
    return total


def read_by_open(cache: str, problem: S3Problem, shards: ShardSet) -> int:
    """Read every shard through s3fs's file object with a cache of fsspec, and return the number of bytes."""
    del problem
    total = 0
    for path in _paths(shards):
        client, name = client_of(path.endpoint), f"{path.bucket}/{path.key}"
        with client.open(name, block_size=PIECE_BYTES, cache_type=cache) as file:
            while block := file.read(_READ_AT_ONCE):
                total += len(block)
    return total


def read_by_ranges(problem: S3Problem, shards: ShardSet) -> int:
    """Read every shard by s3fs's concurrent ranged reads, and return the number of bytes."""
    del problem
    total = 0
    for path, size in zip(_paths(shards), shards.sizes, strict=True):
        begins = range(0, size, PIECE_BYTES)
        for group in (begins[i : i + PIECES_AHEAD + 1] for i in range(0, len(begins), PIECES_AHEAD + 1)):
            names = [f"{path.bucket}/{path.key}"] * len(group)
            ends = [min(begin + PIECE_BYTES, size) for begin in group]
            blocks = client_of(path.endpoint).cat_ranges(names, list(group), ends, on_error="raise")
            total += sum(len(block) for block in blocks)
    return total


Side = Callable[[S3Problem, ShardSet], int]
SIDES: dict[str, Side] = {
    "ours": read_bytes,
    "samples_in_order": read_in_order,
    "samples_in_lanes": read_in_lanes,
    "alternative": read_plainly,
    "s3fs_readahead": partial(read_by_open, "readahead"),
    "s3fs_background": partial(read_by_open, "background"),
    "s3fs_ranges": read_by_ranges,
}


def _measured(rounds: int, problem: S3Problem, shards: ShardSet) -> dict[str, Any]:
    size = _see_equal_bytes(problem, shards)
    memory = {
        name: in_fresh_process(partial(extra_peak_bytes, side, problem, shards))
        for name, side in SIDES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in progress(range(rounds), "s3", rounds):
        for name, side in SIDES.items():
            started = time.perf_counter()
            side(problem, shards)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **medians,
        "ratio": medians["alternative"] / medians["ours"],
        "ratio_of_samples_in_order": medians["alternative"] / medians["samples_in_order"],
        "ratio_of_samples_in_lanes": medians["alternative"] / medians["samples_in_lanes"],
        "ratio_to_s3fs": {
            name: seconds / medians["ours"] for name, seconds in medians.items() if name.startswith("s3fs")
        },
        "memory_ratio": memory["ours"] / memory["alternative"],
        "extra_peak_megabytes": {name: round(value / 1e6, 1) for name, value in memory.items()},
        "megabytes": round(sum(shards.sizes) / 1e6, 1),
        "megabytes_in_members": round(size / 1e6, 1),
    }


def extra_peak_bytes(side: Side, problem: S3Problem, shards: ShardSet) -> int:
    """Return the increase of resident memory while a side reads the dataset."""
    return extra_peak(lambda: side(problem, shards))


def _see_equal_bytes(problem: S3Problem, shards: ShardSet) -> int:
    """Check that all sides read the same bytes; return the number of bytes in samples."""
    package_digest, plain = hashlib.sha256(), hashlib.sha256()
    for shard, url in zip(shards.shards, _urls(shards), strict=True):
        for sample in read_shard(shard):
            for member in _bytes(sample):
                package_digest.update(member)
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - the store's own address
            content = answer.read()
        with tarfile.open(fileobj=BytesIO(content), mode="r:") as archive:
            for member in archive:
                plain.update(content[member.offset_data : member.offset_data + member.size])
    size, total_bytes = read_in_order(problem, shards), sum(shards.sizes)
    byte_sides = [side for name, side in SIDES.items() if not name.startswith("samples")]
    is_whole = all(side(problem, shards) == total_bytes for side in byte_sides)
    if package_digest.digest() != plain.digest() or read_in_lanes(problem, shards) != size or not is_whole:
        raise RuntimeError("the sides read different bytes")
    return size


@dataclass(frozen=True)
class _SizeBatch(Batch):
    """Batch with the number of bytes of each sample."""

    sizes: Tensor


@dataclass(frozen=True)
class _RawSamples:
    """Samples whose members are read but not decoded; a batch has their numbers of bytes."""

    def read(
        self, locations: Sequence[SampleLocation], slots: Slots, seed: int
    ) -> tuple[Columns, dict[int, str]]:
        del slots, seed
        sizes = [
            sum(len(reader.read(member, extension)) for extension in reader.extensions(member))
            for reader, member, _ in locations
        ]
        return {"sizes": np.array(sizes)}, {}

    def batch(self, columns: Columns) -> _SizeBatch:
        return _SizeBatch(
            torch.from_numpy(columns["sizes"]),
            slots=torch.from_numpy(columns["slots"]),
            valid=torch.from_numpy(columns["valid"]),
            keys=columns["keys"].tolist(),
        )


@dataclass(frozen=True)
class _RandomImages:
    """Deterministic samples with random bytes in place of images."""

    numbers: range
    image_bytes: int

    def __call__(self) -> Iterator[Sample]:
        for number in self.numbers:
            image = np.random.default_rng(number).bytes(self.image_bytes)
            yield {KEY: f"{number:08d}", "jpg": image, "txt": f"picture {number}"}


def write_problem(problem: S3Problem, folder: S3Path) -> ShardSet:
    recipes = [
        ShardRecipe(
            shard_name(shard),
            problem.samples,
            _RandomImages(range(shard * problem.samples, (shard + 1) * problem.samples), problem.image_bytes),
        )
        for shard in range(problem.shards)
    ]
    return write_shard_set(folder, {"content": "benchmark"}, recipes, "write")


def _bytes(sample: dict[str, Any]) -> list[bytes]:
    return [member for name, member in sample.items() if name != KEY]


def _paths(shards: ShardSet) -> list[S3Path]:
    return [shard.path for shard in shards.shards if isinstance(shard.path, S3Path)]


def _urls(shards: ShardSet) -> list[str]:
    """Return presigned URLs of the shards."""
    return [
        str(client_of(path.endpoint).sign(f"{path.bucket}/{path.key}", expiration=3600))
        for path in _paths(shards)
    ]


def _delete_bucket(folder: S3Path) -> None:
    listed = _call(folder, "list_objects_v2", Bucket=folder.bucket)
    for entry in listed.get("Contents", []):
        S3Path(folder.bucket, entry["Key"]).unlink()
    _call(folder, "delete_bucket", Bucket=folder.bucket)


def _call(path: S3Path, operation: str, **arguments: object) -> Response:
    return client_of(path.endpoint).call_s3(operation, **arguments)
