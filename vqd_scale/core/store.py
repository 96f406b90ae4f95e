"""Files that are published, not written: nothing half-written is ever taken for whole.

A file is written beside its place under a name that nobody reads, flushed to the disk, and renamed. What a
full disk or a kill leaves behind is a ``*.partial`` file, which readers ignore and the next writer replaces.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqd_scale.core.errors import UserError

PARTIAL = ".partial"


@contextmanager
def published(path: Path) -> Generator[Path]:
    """Give a path to write to; on success the file appears at ``path`` at once, on failure not at all.

    Raises:
        UserError: The disk is full, the folder is read-only or missing rights.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync_to_disk(partial)
            partial.replace(path)
            sync_to_disk(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def published_folder(path: Path) -> Generator[Path]:
    """Give a folder to fill; on success it takes the place of ``path`` at once, on failure not at all.

    Raises:
        UserError: The disk is full, or the place is read-only or missing rights.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                sync_to_disk(file)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            sync_to_disk(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn what a user can mend (a full disk, missing rights) into one sentence that names ``path``.

    Raises:
        UserError: The operating system refused the write.
    """
    mendable = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the quota is used up; free some space and run the same command again",
        errno.EFBIG: "the file would be larger than this file system or its limit allows",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission was denied",
        errno.EPERM: "permission was denied",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
        errno.EISDIR: "a folder of this name is in the way",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in mendable:
            raise
        raise UserError(f"{path}: cannot be written: {mendable[error.errno]}.") from None


def publish_text(path: Path, text: str) -> None:
    """Write a small text file at once.

    Raises:
        UserError: See `published`.
    """
    with published(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_json(path: Path, value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write a JSON file at once.

    Raises:
        UserError: See `published`.
    """
    publish_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Read a JSON file; ``what`` says in errors what the file should have been.

    Raises:
        UserError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {what} here.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this {what} cannot be read ({error}).") from None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
