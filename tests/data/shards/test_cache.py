import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from vqd_scale.core.atomic_io import file_sizes
from vqd_scale.core.errors import UserError
from vqd_scale.data.config import CacheConfig
from vqd_scale.data.shards.cache import ShardCache
from vqd_scale.data.shards.shard_index import Shard

SIZE = 1000

KILLED_WHILE_FETCHING = """
import os, signal, sys
from pathlib import Path
from vqd_scale.data.shards import cache
from tests.data.shards.test_cache import cache_of, shard_of

def half_of_it(path):
    yield path.read_bytes()[:500]
    os.kill(os.getpid(), signal.SIGKILL)

cache.read_in_order = half_of_it
cache_of(Path(sys.argv[1]), shards=4).open(shard_of(Path(sys.argv[2]), 0))
"""


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def shard_of(folder: Path, number: int) -> Shard:
    """Return a remote shard, here in the test's folder."""
    path = folder / f"{number:06d}.tar"
    digest = hashlib.sha256(content(number)).hexdigest()
    return Shard(path, path.with_suffix(".npz"), 1, SIZE, digest, 1, "", "")


def cache_of(folder: Path, shards: float) -> ShardCache:
    return ShardCache(CacheConfig(folder=folder, max_gigabytes=shards * SIZE / 1e9))


@pytest.fixture
def remote_shards(tmp_path: Path) -> Path:
    folder = tmp_path / "far"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:06d}.tar").write_bytes(content(number))
    return folder


@contextmanager
def opened_shard(cache: ShardCache, shard: Shard) -> Generator[bytes | None]:
    """Open a shard's cached file and yield its bytes, or ``None`` if the cache has no room."""
    descriptor = cache.open(shard)
    try:
        yield None if descriptor is None else os.pread(descriptor, 2 * SIZE, 0)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def cached_bytes(cache: ShardCache, shard: Shard) -> bytes | None:
    with opened_shard(cache, shard) as content_bytes:
        return content_bytes


def stored_bytes(folder: Path) -> int:
    """Return the bytes of shards in a cache's folder, including partial downloads."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock-of-room").open("w") as lock:
        # No download starts or ends during the count; a renamed file counts once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = file_sizes(folder).items()
    return sum({name.removesuffix(".partial"): size for name, size in sizes if ".tar" in name}.values())


def test_shard_is_fetched_once(remote_shards: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "near", shards=4)
    assert cached_bytes(cache, shard_of(remote_shards, 3)) == content(3)
    (remote_shards / "000003.tar").unlink()
    assert cached_bytes(cache, shard_of(remote_shards, 3)) == content(3)
    assert cached_bytes(cache_of(tmp_path / "near", shards=4), shard_of(remote_shards, 3)) == content(3)


def test_least_recently_used_shard_is_evicted(remote_shards: Path, tmp_path: Path) -> None:
    cache_folder = tmp_path / "near"
    cache = cache_of(cache_folder, shards=3)
    for number in (0, 1, 2, 0, 3, 0, 4):
        assert cached_bytes(cache, shard_of(remote_shards, number)) == content(number)
        assert stored_bytes(cache_folder) <= 3 * SIZE
        time.sleep(0.01)
    present = {
        number
        for number in range(8)
        if (cache_folder / f"{shard_of(remote_shards, number).sha256}.tar").exists()
    }
    assert present == {0, 3, 4}


def test_shard_in_use_is_kept_and_oversized_shard_is_not_cached(remote_shards: Path, tmp_path: Path) -> None:
    cache_folder = tmp_path / "near"
    cache = cache_of(cache_folder, shards=2)
    with ExitStack() as stack:
        for number in (0, 1, 0):
            assert stack.enter_context(opened_shard(cache, shard_of(remote_shards, number))) == content(
                number
            )
        assert cached_bytes(cache, shard_of(remote_shards, 2)) is None
        assert cached_bytes(cache, shard_of(remote_shards, 0)) == content(0)
        assert stored_bytes(cache_folder) == 2 * SIZE
    assert cached_bytes(cache, shard_of(remote_shards, 2)) == content(2)
    assert cached_bytes(cache_of(tmp_path / "small", shards=0.5), shard_of(remote_shards, 2)) is None


def test_shard_with_wrong_digest_is_refused(remote_shards: Path, tmp_path: Path) -> None:
    cache_folder = tmp_path / "near"
    cache = cache_of(cache_folder, shards=4)
    (remote_shards / "000001.tar").write_bytes(content(0))
    with pytest.raises(UserError, match=r"000001\.tar: changed or damaged since it was indexed"):
        cache.open(shard_of(remote_shards, 1))
    (remote_shards / "000002.tar").unlink()
    with pytest.raises(UserError, match=r"000002\.tar: missing, although the set's index lists it"):
        cache.open(shard_of(remote_shards, 2))
    assert stored_bytes(cache_folder) == 0


def test_dataset_without_digests(remote_shards: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "near", shards=4)
    for number in (0, 1):
        path = remote_shards / f"{number:06d}.tar"
        assert cached_bytes(
            cache, Shard(path, path.with_suffix(".npz"), 1, SIZE, "", 1, f"{number}", "")
        ) == content(number)


@pytest.mark.parametrize("following", [0, 1])
def test_partial_file_of_killed_process_is_ignored(
    remote_shards: Path, tmp_path: Path, following: int
) -> None:
    cache_folder = tmp_path / "near"
    command = [sys.executable, "-c", KILLED_WHILE_FETCHING, str(cache_folder), str(remote_shards)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert stored_bytes(cache_folder) == SIZE
    cache = cache_of(cache_folder, shards=1)
    assert cached_bytes(cache, shard_of(remote_shards, following)) == content(following)
    assert stored_bytes(cache_folder) == SIZE


def test_locked_shard_is_awaited_or_bypassed(remote_shards: Path, tmp_path: Path) -> None:
    cache_folder = tmp_path / "near"
    cache = cache_of(cache_folder, shards=1)
    cached_bytes(cache, shard_of(remote_shards, 0))
    file = cache_folder / f"{shard_of(remote_shards, 0).sha256}.tar"
    partial = file.rename(file.with_name(file.name + ".partial"))
    lock = cache_folder / f"lock-{int(file.name[:8], 16) % 64:02d}"
    with lock.open() as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        assert cached_bytes(cache, shard_of(remote_shards, 1)) is None
    assert partial.exists()
    assert cached_bytes(cache, shard_of(remote_shards, 1)) == content(1)
    assert not partial.exists()


def read_many(cache_folder: Path, remote_shards: Path, first: int) -> int:
    """Read shards in a process-specific order; return how many were cached at that moment."""
    cache = cache_of(cache_folder, shards=3)
    reads = [cached_bytes(cache, shard_of(remote_shards, (first + 3 * turn) % 8)) for turn in range(40)]
    wrong = [turn for turn, data in enumerate(reads) if data not in (None, content((first + 3 * turn) % 8))]
    if wrong:
        raise AssertionError(wrong)
    return sum(data is not None for data in reads)


def test_many_processes_share_a_folder(remote_shards: Path, tmp_path: Path) -> None:
    cache_folder = tmp_path / "near"
    with get_context("spawn").Pool(3) as pool:
        waiting = pool.starmap_async(read_many, [(cache_folder, remote_shards, first) for first in range(3)])
        most = 0
        while not waiting.ready():
            most = max(most, stored_bytes(cache_folder))
            time.sleep(0.001)
    assert all(count > 20 for count in waiting.get())
    assert 0 < most <= 3 * SIZE


def test_other_files_in_the_folder_are_never_evicted(remote_shards: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "near", shards=1)
    (tmp_path / "near").mkdir()
    names = ("mine.tar", "a" * 64 + ".tar.gz", "notes.tar.partial")
    for name in names:
        (tmp_path / "near" / name).write_bytes(bytes(SIZE))
        os.utime(tmp_path / "near" / name, (0, 0))
    for number in range(2):
        assert cached_bytes(cache, shard_of(remote_shards, number)) == content(number)
    assert all((tmp_path / "near" / name).exists() for name in names)
