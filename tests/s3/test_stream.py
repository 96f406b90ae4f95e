"""Shards in S3 give the batches of equal shards on a disk, also under faults."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.s3.proxy import Fault, FaultProxy, in_turn
from vqd_scale.core.atomic_io import Location, file_sizes
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import RetryPolicy
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.sample_readers import TokenSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard, shard_name, write_shard_set

pytestmark = pytest.mark.s3

COUNTS = (50, 1, 110, 80, 30)
LANES = 12
LENGTH = 600
TOKENS = TokenSamples(length=LENGTH, codes=1000, text_length=3)


class Samples:
    """Yield the samples of one shard; picklable."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __call__(self) -> Iterator[Sample]:
        for number in self.numbers:
            yield {
                KEY: f"{number:04d}",
                "tokens.npy": np.arange(number, number + LENGTH, dtype=np.uint16),
                "text.npy": np.array([number, 7, 0], dtype=np.int32),
                "txt": f"number {number}",
            }


def write_tokens(folder: Location) -> ShardSet:
    ends = np.cumsum(COUNTS).tolist()
    recipes = [
        ShardRecipe(shard_name(shard), count, Samples(range(end - count, end)))
        for shard, (count, end) in enumerate(zip(COUNTS, ends, strict=True))
    ]
    return write_shard_set(folder, {"content": "tokens"}, recipes, "test")


@pytest.fixture(scope="module")
def two_sets(
    new_folder: Callable[[], S3Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, S3Path]:
    """Equal datasets on disk and in S3."""
    local_set, remote_set = tmp_path_factory.mktemp("set"), new_folder()
    write_tokens(local_set)
    write_tokens(remote_set)
    return local_set, remote_set


def batches(
    path: Location,
    report: Path,
    count: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    cursor: int = 0,
    overrides: tuple[str, ...] = (),
) -> list[TokenBatch]:
    settings_overrides = (f"path={path}", f"global_batch_size={LANES}", "shuffle_window=8", *overrides)
    config = load_config(StreamConfig, overrides=settings_overrides)
    stream = Stream(
        config, TOKENS, seed=3, rank=rank, ranks=ranks, cursor=cursor, quarantine=report / "bad.jsonl"
    )
    with closing(iter(stream)) as iterator:
        return list(itertools.islice(iterator, count))


def contents(parts: list[TokenBatch]) -> list[tuple[list[str], list[int], list[list[int]], list[list[int]]]]:
    return [
        (part.keys, part.slots.tolist(), part.tokens.tolist(), part.text.tolist())
        for part in parts
        if part.valid.all()
    ]


def test_dataset_bytes_are_equal_on_s3(two_sets: tuple[Path, S3Path]) -> None:
    local_set, remote_set = two_sets
    assert file_sizes(local_set) == file_sizes(remote_set)
    for name in file_sizes(local_set):
        assert (local_set / name).read_bytes() == (remote_set / name).read_bytes()


faults = st.builds(
    Fault, st.sampled_from(["reset", "close", "truncate", "500", "503"]), st.integers(0, 100_000)
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(faults, max_size=3),
    ranks=st.sampled_from([1, 2, 4]),
    begin=st.integers(0, 30),
    memory=st.sampled_from([(), ("shuffle_window=5000",)]),
)
def test_global_batches_are_equal_under_faults(
    two_sets: tuple[Path, S3Path],
    proxy: FaultProxy,
    short_retries: RetryPolicy,
    tmp_path: Path,
    plan: list[Fault],
    ranks: int,
    begin: int,
    memory: tuple[str, ...],
) -> None:
    local_set, remote_set = two_sets
    # One megabyte fits windows of 8 samples but not of 5,000: then each sample is one request.
    overrides = ("ranged_reads.buffer_megabytes=1", *memory)
    for rank in range(ranks):
        part = functools.partial(batches, rank=rank, ranks=ranks, cursor=begin * LANES, overrides=overrides)
        proxy.follow(in_turn(plan))
        through = part(proxy.to(remote_set), tmp_path, 25)
        assert contents(through) == contents(part(local_set, tmp_path, 25))
        assert len(contents(through)) == 25


def test_every_sample_once_per_epoch_with_reader_processes(
    two_sets: tuple[Path, S3Path], proxy: FaultProxy, tmp_path: Path
) -> None:
    local_set, remote_set = two_sets
    proxy.follow(in_turn([Fault("503"), Fault("reset", 5000), Fault("close", 700)]))
    through = batches(proxy.to(remote_set), tmp_path, 46, overrides=("num_workers=2",))
    assert contents(through) == contents(batches(local_set, tmp_path, 46))
    keys = [key for batch in through for key in batch.keys]
    total = sum(COUNTS)
    for epoch in (keys[:total], keys[total : 2 * total]):
        assert sorted(epoch) == [f"{number:04d}" for number in range(total)]
    assert set(proxy.faults) == {"503", "reset", "close"}


def test_sequential_shard_read_survives_faults(
    two_sets: tuple[Path, S3Path], proxy: FaultProxy, short_retries: RetryPolicy
) -> None:
    local_set, remote_set = two_sets
    proxy.follow(in_turn([Fault("truncate", 3000), Fault("500"), Fault("reset", 100)], ending=".tar"))
    for local_shard, remote_shard in zip(
        ShardSet.open(local_set).shards, ShardSet.open(proxy.to(remote_set)).shards, strict=True
    ):
        assert list(read_shard(local_shard)) == list(read_shard(remote_shard))
    assert set(proxy.faults) == {"truncate", "500", "reset"}


@pytest.mark.parametrize("gigabytes", [1.0, 0.0004, 0.00001])
def test_batches_through_a_cache_are_equal(
    two_sets: tuple[Path, S3Path],
    proxy: FaultProxy,
    short_retries: RetryPolicy,
    tmp_path: Path,
    gigabytes: float,
) -> None:
    local_set, remote_set = two_sets
    cache_folder = tmp_path / "kept"
    cache = (f"ranged_reads.cache.folder={cache_folder}", f"ranged_reads.cache.max_gigabytes={gigabytes}")
    proxy.follow(in_turn([Fault("close", 100_000), Fault("reset", 1000)]))
    expected = contents(batches(local_set, tmp_path, 50))
    assert contents(batches(proxy.to(remote_set), tmp_path, 50, overrides=cache)) == expected
    sizes = [path.stat().st_size for path in cache_folder.glob("*.tar*")]
    assert sum(sizes) <= gigabytes * 1e9
    if gigabytes == 1.0:
        assert len(sizes) == len(COUNTS)
        proxy.follow(in_turn([]))
        assert contents(batches(proxy.to(remote_set), tmp_path, 50, overrides=cache)) == expected
        # The tables are read again, the shards are not.
        assert {path for method, path in proxy.requests if method == "GET" and path.endswith(".tar")} == set()


def test_unresponsive_store_stops_the_stream(
    two_sets: tuple[Path, S3Path], proxy: FaultProxy, short_retries: RetryPolicy, tmp_path: Path
) -> None:
    _, remote_set = two_sets
    proxy.follow(in_turn([Fault("503")] * 1000, ending="000002.tar"))
    with pytest.raises(UserError, match=r"000002\.tar\?.*could not be read in 5 attempts.*SlowDown"):
        batches(
            proxy.to(remote_set),
            tmp_path,
            60,
            overrides=("shuffle_window=5000", "ranged_reads.buffer_megabytes=1"),
        )


def test_changed_dataset_is_refused(folder: S3Path, tmp_path: Path) -> None:
    write_tokens(folder)
    (folder / "000002.npz").unlink()
    with pytest.raises(UserError, match=r"000002\.npz: missing, although the index lists it"):
        batches(folder, tmp_path, 60)
    (folder / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar: missing, as 1 of "):
        batches(folder, tmp_path, 1)
    with pytest.raises(UserError, match="no set of shards"):
        batches(folder / "nowhere", tmp_path, 1)
