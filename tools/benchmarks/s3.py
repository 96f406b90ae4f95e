"""Shards read from S3, as bytes and as samples, beside one plain GET after the other of the same shards.

Plain is a GET over HTTP whose bytes are let go at once: no client can be faster. Where the store is on the
machine that reads, both share its processors, and the figures say as much about those as about reading.
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
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import Answer
from vqd_scale.data.loading.batch import Batch
from vqd_scale.data.loading.sample_readers import Columns, SampleLocation, Slots
from vqd_scale.data.loading.stream import Stream, StreamConfig
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard, shard_name, write_shard_set

_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class S3Problem:
    """A set of shards; by default four of 66 MB, as full of pictures as those of public sets."""

    shards: int = 4
    samples: int = 640
    picture_bytes: int = 100_000
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
        return _measured(rounds, problem, _written(problem, folder))
    finally:
        _delete_bucket(folder)


def read_bytes(problem: S3Problem, shards: ShardSet) -> int:
    """Read every shard from its first byte to its last, as hashing, indexing and the cache do."""
    del problem
    return sum(len(block) for path in _paths(shards) for block in store.read_in_order(path))


def read_in_order(problem: S3Problem, shards: ShardSet) -> int:
    """Read every member of every sample, shard by shard; how many bytes they have."""
    del problem
    samples = (sample for shard in shards.shards for sample in read_shard(shard))
    return sum(len(member) for sample in samples for member in _bytes(sample))


def read_in_lanes(problem: S3Problem, shards: ShardSet) -> int:
    """The same in the order of training: one epoch of global batches."""
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
    """GET every shard, one after the other, and let go of its bytes; how many there are."""
    del problem
    total = 0
    for url in _urls(shards):
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - the store's own address
            while block := answer.read(_READ_AT_ONCE):
                total += len(block)
    return total


def read_by_library(problem: S3Problem, shards: ShardSet) -> int:
    """The same by the client that is under our reader: a GET of every shard, its bytes at once."""
    del problem

    async def get(path: S3Path) -> int:
        answer = await path.endpoint.call("get_object", Bucket=path.bucket, Key=path.key)
        async with answer["Body"] as body:
            return len(await body.read())

    return sum(path.endpoint.waited(get(path)) for path in _paths(shards))


Side = Callable[[S3Problem, ShardSet], int]
SIDES: dict[str, Side] = {
    "ours": read_bytes,
    "samples_in_order": read_in_order,
    "samples_in_lanes": read_in_lanes,
    "alternative": read_plainly,
    "library": read_by_library,
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
        "ratio_to_library": medians["library"] / medians["ours"],
        "memory_ratio": memory["ours"] / memory["alternative"],
        "extra_peak_megabytes": {name: round(value / 1e6, 1) for name, value in memory.items()},
        "megabytes": round(sum(shards.sizes) / 1e6, 1),
        "megabytes_in_members": round(size / 1e6, 1),
    }


def extra_peak_bytes(side: Side, problem: S3Problem, shards: ShardSet) -> int:
    """How far resident memory rises while a side reads the set."""
    return extra_peak(lambda: side(problem, shards))


def _see_equal_bytes(problem: S3Problem, shards: ShardSet) -> int:
    """See that all sides read the same bytes; how many those of the samples are."""
    ours, plain = hashlib.sha256(), hashlib.sha256()
    for shard, url in zip(shards.shards, _urls(shards), strict=True):
        for sample in read_shard(shard):
            for member in _bytes(sample):
                ours.update(member)
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - the store's own address
            content = answer.read()
        with tarfile.open(fileobj=BytesIO(content), mode="r:") as archive:
            for member in archive:
                plain.update(content[member.offset_data : member.offset_data + member.size])
    size, whole = read_in_order(problem, shards), read_bytes(problem, shards)
    is_whole = whole == read_plainly(problem, shards) == sum(shards.sizes)
    if ours.digest() != plain.digest() or read_in_lanes(problem, shards) != size or not is_whole:
        raise RuntimeError("the sides read different bytes")
    return size


@dataclass(frozen=True)
class _SizeBatch(Batch):
    """Batch with the number of bytes of each sample."""

    sizes: Tensor


@dataclass(frozen=True)
class _RawSamples:
    """Samples whose members are read and nothing more; a batch has their numbers of bytes."""

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
class _Pictures:
    """Samples with what looks like a picture to everybody but a decoder; the same ones at each call."""

    numbers: range
    picture_bytes: int

    def __call__(self) -> Iterator[Sample]:
        for number in self.numbers:
            picture = np.random.default_rng(number).bytes(self.picture_bytes)
            yield {KEY: f"{number:08d}", "jpg": picture, "txt": f"picture {number}"}


def _written(problem: S3Problem, folder: S3Path) -> ShardSet:
    recipes = [
        ShardRecipe(
            shard_name(shard),
            problem.samples,
            _Pictures(range(shard * problem.samples, (shard + 1) * problem.samples), problem.picture_bytes),
        )
        for shard in range(problem.shards)
    ]
    return write_shard_set(folder, {"content": "benchmark"}, recipes, "write")


def _bytes(sample: dict[str, Any]) -> list[bytes]:
    return [member for name, member in sample.items() if name != KEY]


def _paths(shards: ShardSet) -> list[S3Path]:
    return [shard.path for shard in shards.shards if isinstance(shard.path, S3Path)]


def _urls(shards: ShardSet) -> list[str]:
    """Addresses under which anyone may read the shards for some time."""
    return [
        str(
            _call(
                path,
                "generate_presigned_url",
                ClientMethod="get_object",
                Params={"Bucket": path.bucket, "Key": path.key},
            )
        )
        for path in _paths(shards)
    ]


def _delete_bucket(folder: S3Path) -> None:
    listed = _call(folder, "list_objects_v2", Bucket=folder.bucket)
    for entry in listed.get("Contents", []):
        S3Path(folder.bucket, entry["Key"]).unlink()
    _call(folder, "delete_bucket", Bucket=folder.bucket)


def _call(path: S3Path, operation: str, **arguments: object) -> Answer:
    return path.endpoint.waited(path.endpoint.call(operation, **arguments))
