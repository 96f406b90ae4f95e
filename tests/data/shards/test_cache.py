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
from vqd_scale.data.shards.cache import CacheConfig, ShardCache
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
    """A shard in a far place; here, the test's folder."""
    path = folder / f"{number:06d}.tar"
    return Shard(path, path.with_suffix(".npz"), 1, SIZE, hashlib.sha256(content(number)).hexdigest())


def cache_of(folder: Path, shards: float) -> ShardCache:
    return ShardCache(CacheConfig(folder=folder, max_gigabytes=shards * SIZE / 1e9))


@pytest.fixture
def far(tmp_path: Path) -> Path:
    folder = tmp_path / "far"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:06d}.tar").write_bytes(content(number))
    return folder


@contextmanager
def held(cache: ShardCache, shard: Shard) -> Generator[bytes | None]:
    """What a shard's file holds, kept open meanwhile; None if there was no room."""
    descriptor = cache.open(shard)
    try:
        yield None if descriptor is None else os.pread(descriptor, 2 * SIZE, 0)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def read(cache: ShardCache, shard: Shard) -> bytes | None:
    with held(cache, shard) as found:
        return found


def kept(folder: Path) -> int:
    """Bytes of shards in a cache's folder, those that are being fetched among them."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock-of-room").open("w") as lock:
        # Nothing is begun or deleted meanwhile; what is published under a new name counts once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = file_sizes(folder).items()
    return sum({name.removesuffix(".partial"): size for name, size in sizes if ".tar" in name}.values())


def test_a_shard_is_fetched_once(far: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "near", shards=4)
    assert read(cache, shard_of(far, 3)) == content(3)
    (far / "000003.tar").unlink()
    assert read(cache, shard_of(far, 3)) == content(3)
    assert read(cache_of(tmp_path / "near", shards=4), shard_of(far, 3)) == content(3)


def test_what_was_used_longest_ago_makes_room(far: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    cache = cache_of(near, shards=3)
    for number in (0, 1, 2, 0, 3, 0, 4):
        assert read(cache, shard_of(far, number)) == content(number)
        assert kept(near) <= 3 * SIZE
        time.sleep(0.01)
    present = {number for number in range(8) if (near / f"{shard_of(far, number).sha256}.tar").exists()}
    assert present == {0, 3, 4}


def test_what_is_being_read_stays_and_what_finds_no_room_is_not_kept(far: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    cache = cache_of(near, shards=2)
    with ExitStack() as stack:
        for number in (0, 1, 0):
            assert stack.enter_context(held(cache, shard_of(far, number))) == content(number)
        assert read(cache, shard_of(far, 2)) is None
        assert read(cache, shard_of(far, 0)) == content(0)
        assert kept(near) == 2 * SIZE
    assert read(cache, shard_of(far, 2)) == content(2)
    assert read(cache_of(tmp_path / "small", shards=0.5), shard_of(far, 2)) is None


def test_a_shard_that_is_not_the_indexed_one_is_refused(far: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    cache = cache_of(near, shards=4)
    (far / "000001.tar").write_bytes(content(0))
    with pytest.raises(UserError, match=r"000001\.tar: changed since it was indexed"):
        cache.open(shard_of(far, 1))
    (far / "000002.tar").unlink()
    with pytest.raises(UserError, match=r"000002\.tar: missing, although the set's index lists it"):
        cache.open(shard_of(far, 2))
    assert kept(near) == 0


def test_a_set_without_digests(far: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "near", shards=4)
    for number in (0, 1):
        path = far / f"{number:06d}.tar"
        assert read(cache, Shard(path, path.with_suffix(".npz"), 1, SIZE, "")) == content(number)


@pytest.mark.parametrize("following", [0, 1])
def test_what_a_kill_leaves_is_no_shard_and_takes_no_room(far: Path, tmp_path: Path, following: int) -> None:
    near = tmp_path / "near"
    command = [sys.executable, "-c", KILLED_WHILE_FETCHING, str(near), str(far)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert kept(near) == SIZE
    cache = cache_of(near, shards=1)
    assert read(cache, shard_of(far, following)) == content(following)
    assert kept(near) == SIZE


def test_one_that_is_being_fetched_is_waited_for_or_left_alone(far: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    cache = cache_of(near, shards=1)
    read(cache, shard_of(far, 0))
    file = near / f"{shard_of(far, 0).sha256}.tar"
    partial = file.rename(file.with_name(file.name + ".partial"))
    lock = near / f"lock-{int(file.name[:8], 16) % 64:02d}"
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert read(cache, shard_of(far, 1)) is None
    assert partial.exists()
    assert read(cache, shard_of(far, 1)) == content(1)
    assert not partial.exists()


def read_many(near: Path, far: Path, first: int) -> int:
    """Read shards in an order of one's own; how many were kept at that moment."""
    cache = cache_of(near, shards=3)
    found = [read(cache, shard_of(far, (first + 3 * turn) % 8)) for turn in range(40)]
    wrong = [turn for turn, data in enumerate(found) if data not in (None, content((first + 3 * turn) % 8))]
    if wrong:
        raise AssertionError(wrong)
    return sum(data is not None for data in found)


def test_many_processes_share_a_folder(far: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    with get_context("spawn").Pool(3) as pool:
        waiting = pool.starmap_async(read_many, [(near, far, first) for first in range(3)])
        most = 0
        while not waiting.ready():
            most = max(most, kept(near))
            time.sleep(0.001)
    assert all(count > 20 for count in waiting.get())
    assert 0 < most <= 3 * SIZE
