"""Shards of S3 kept on this machine's disk: one folder with a bound, shared by all processes of the machine.

A shard is kept under its SHA-256, so that equal shards of different sets are one file and a changed one is
another; one of unknown digest under its path and size. Who needs a shard takes the lock of its name, so that
it is fetched once, reserves its room, and publishes it checked and whole. Room is made by deleting what was
used longest ago and is not being read; where that does not suffice, a shard is not kept. All locks are the
kernel's, and end with their process.
"""

import fcntl
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field

from vqd_scale.core.atomic_io import PARTIAL, published, read_in_order, writing
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import Shard

_LOCKS = 64
_SUFFIX = ".tar"


class CacheConfig(Config):
    """Where shards of S3 are kept on each machine.

    Attributes:
        folder: Folder on a local disk, which all runs of a machine may share.
        max_gigabytes: Largest size; a shard that does not fit beside the shards in use is not cached.
    """

    folder: Path
    max_gigabytes: float = Field(gt=0)


class ShardCache:
    """The shards that this machine keeps; any number of processes may use one folder at once."""

    def __init__(self, config: CacheConfig) -> None:
        self.folder = config.folder
        self.capacity = int(config.max_gigabytes * 1e9)

    def open(self, shard: Shard) -> int | None:
        """A descriptor of the shard's bytes, fetched unless they are kept already; None if there is no room.

        The file stays as long as the descriptor is open; the caller closes it.

        Raises:
            UserError: The shard is missing or is not the one that was indexed; its store cannot be reached;
                the folder cannot be written.
        """
        identity = shard.sha256 or hashlib.sha256(f"{shard.path} {shard.size}".encode()).hexdigest()
        path = self.folder / (identity + _SUFFIX)
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._lock_of(path)):
                descriptor = _held(path)
                if descriptor is None and self._reserve(path, shard.size):
                    _fetch(shard, path)
                    descriptor = _held(path)
                return descriptor

    def _reserve(self, path: Path, size: int) -> bool:
        """Whether there is room; an empty file of the shard's size stands for it from then on."""
        partial = path.with_name(path.name + PARTIAL)
        with _locked(self.folder / "lock-of-room"):
            # Whoever began it is dead: its lock is ours.
            partial.unlink(missing_ok=True)
            kept: list[tuple[float, int, Path]] = []
            for published_file in self._names():
                state = _state_of(published_file)
                if state is not None:
                    kept.append(state)
            free = self.capacity - sum(file_size for _, file_size, _ in kept)
            for _, file_size, file in sorted(kept):
                if free < size and self._deleted(file):
                    free += file_size
            if free < size:
                return False
            with partial.open("wb") as file:
                file.truncate(size)
            return True

    def _names(self) -> set[Path]:
        """The shards that are kept or being fetched, by the paths at which they are or will be published.

        Whoever publishes meanwhile renames, and one listing may then show neither name. Each is renamed once
        and begun only under the lock of room, so of two listings one at least shows it.
        """
        listings = [*self.folder.glob(f"*{_SUFFIX}*")], [*self.folder.glob(f"*{_SUFFIX}*")]
        return {file.with_name(file.name.removesuffix(PARTIAL)) for listing in listings for file in listing}

    def _deleted(self, file: Path) -> bool:
        """Delete a file, unless somebody reads it or is fetching it; whether that was done."""
        is_partial = file.name.endswith(PARTIAL)
        lock = self._lock_of(file.with_suffix("")) if is_partial else file
        with _locked(lock, wait=False) as is_free:
            if is_free:
                file.unlink(missing_ok=True)
            return is_free

    def _lock_of(self, path: Path) -> Path:
        return self.folder / f"lock-{int(path.name[:8], 16) % _LOCKS:02d}"


def _state_of(path: Path) -> tuple[float, int, Path] | None:
    """Time of last use, bytes and name of a shard that is kept, or of its part that is being fetched."""
    # The part first: once it has its final name it keeps it.
    for file in (path.with_name(path.name + PARTIAL), path):
        with suppress(FileNotFoundError):
            state = file.stat()
            return state.st_mtime, state.st_size, file
    return None


def _fetch(shard: Shard, path: Path) -> None:
    digest = hashlib.sha256()
    try:
        with published(path) as partial, partial.open("r+b") as file:
            for piece in read_in_order(shard.path):
                digest.update(piece)
                file.write(piece)
            if shard.sha256 and digest.hexdigest() != shard.sha256:
                raise UserError(f"{shard.path}: changed since it was indexed; make the set's index again.")
    except FileNotFoundError:
        raise UserError(f"{shard.path}: missing, although the set's index lists it.") from None


def _held(path: Path) -> int | None:
    """Open a file so that nobody deletes it; None if it is not there, or being deleted."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if not _taken(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB) or os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return None
    # When it was used last; access times are not kept on every file system.
    os.utime(descriptor)
    return descriptor


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold a file's lock; without waiting, gives whether it could be had."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        yield _taken(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    return True
