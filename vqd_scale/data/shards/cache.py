"""Local disk cache of S3 shards: one folder of bounded size, shared by all processes of a machine.

The cache key of a shard is its SHA-256, so equal shards of different datasets share a file, and a changed
shard gets a new file. If the digest is unknown, the key is a hash of path and version. A process that needs a
shard takes the lock of its key, so that the shard is downloaded once. The steps are: reserve space, download,
verify the digest, publish by atomic rename. Space is freed by LRU eviction of files that are not being read;
if that is not enough, the shard is not cached. All locks are kernel locks (``flock``), which end with their
process.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqd_scale.core.atomic_io import PARTIAL, read_in_order, sync_to_disk, writing
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Object, S3Path
from vqd_scale.data.config import CacheConfig
from vqd_scale.data.shards.shard_index import Shard, changed

_LOCKS = 64
_SUFFIX = ".tar"
_NAME = re.compile(rf"[0-9a-f]{{64}}\{_SUFFIX}")


class ShardCache:
    """Shard cache of this machine; any number of processes may share one folder."""

    def __init__(self, config: CacheConfig) -> None:
        self.folder = config.folder
        self.capacity = int(config.max_gigabytes * 1e9)

    def open(self, shard: Shard) -> int | None:
        """Open a shard's file, downloading it on a cache miss; return None if there is no space.

        The file is not evicted while the descriptor is open. The caller closes the descriptor.

        Raises:
            UserError: The shard is missing or changed since it was indexed; its store cannot be reached; the
                folder cannot be written.
        """
        identity = shard.sha256 or hashlib.sha256(f"{shard.path} {shard.version}".encode()).hexdigest()
        path = self.folder / (identity + _SUFFIX)
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._lock_of(path)):
                descriptor = _open_locked(path)
                if descriptor is None and self._reserve(path, shard.size):
                    _fetch(shard, path)
                    descriptor = _open_locked(path)
                return descriptor

    def _reserve(self, path: Path, size: int) -> bool:
        """Reserve space with a sparse file of the shard's size; return False if there is not enough."""
        partial = path.with_name(path.name + PARTIAL)
        with _locked(self.folder / "lock-of-room"):
            # Left over from a killed process: this process holds the lock of the key.
            partial.unlink(missing_ok=True)
            files = [state for file in self._names() if (state := _state_of(file)) is not None]
            free = self.capacity - sum(file_size for _, file_size, _ in files)
            for _, file_size, file in sorted(files):
                if free < size and self._deleted(file):
                    free += file_size
            if free < size:
                return False
            with partial.open("wb") as file:
                file.truncate(size)
            return True

    def _names(self) -> set[Path]:
        """List cached shards and running downloads by their published paths.

        A concurrent rename can hide a shard under both of its names from one listing. Each file is renamed
        once, and downloads start only under the lock of room, so at least one of two listings shows it.
        """
        listed = [*self.folder.iterdir(), *self.folder.iterdir()]
        names = {file.name.removesuffix(PARTIAL) for file in listed}
        return {self.folder / name for name in names if _NAME.fullmatch(name)}

    def _deleted(self, file: Path) -> bool:
        """Delete a file unless it is being read or downloaded; return whether it was deleted."""
        is_partial = file.name.endswith(PARTIAL)
        lock = self._lock_of(file.with_suffix("")) if is_partial else file
        with _locked(lock, wait=False) as is_free:
            if is_free:
                file.unlink(missing_ok=True)
            return is_free

    def _lock_of(self, path: Path) -> Path:
        return self.folder / f"lock-{int(path.name[:8], 16) % _LOCKS:02d}"


def _state_of(path: Path) -> tuple[float, int, Path] | None:
    """Return last use, size in bytes and path of a cached shard or of its partial download."""
    # Check the partial file first: it can become the final file between the checks, but not vice versa.
    for file in (path.with_name(path.name + PARTIAL), path):
        with suppress(FileNotFoundError):
            state = file.stat()
            return state.st_mtime, state.st_size, file
    return None


def _fetch(shard: Shard, path: Path) -> None:
    digest, partial = hashlib.sha256(), path.with_name(path.name + PARTIAL)
    source = shard.path
    is_distant = isinstance(source, S3Path)
    blocks = S3Object(source, shard.size, shard.etag).blocks() if is_distant else read_in_order(source)
    try:
        with partial.open("r+b") as file:
            for piece in blocks:
                digest.update(piece)
                file.write(piece)
        if shard.sha256 and digest.hexdigest() != shard.sha256:
            raise changed(shard.path, "its SHA-256 is another")
        sync_to_disk(partial)
        partial.replace(path)
    except FileNotFoundError:
        raise UserError(f"{shard.path}: missing, although the set's index lists it.") from None
    finally:
        partial.unlink(missing_ok=True)


def _open_locked(path: Path) -> int | None:
    """Open a file under a shared lock, which prevents eviction; None if it is missing or being deleted."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if not _acquired(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB) or os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return None
    # Record the last use as mtime; not every file system keeps access times.
    os.utime(descriptor)
    return descriptor


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold a file's exclusive lock; with ``wait=False``, yield whether the lock was acquired."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        yield _acquired(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _acquired(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    return True
