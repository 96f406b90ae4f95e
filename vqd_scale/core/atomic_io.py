"""Atomic file writes: readers never see a half-written file.

On a file system, a file is written to ``*.partial`` in the same folder, flushed to the disk, and renamed
atomically. A full disk or a kill can leave a ``*.partial`` file; readers ignore it and the next writer
replaces it. For S3, the file is written to a local temporary folder and then uploaded; an object appears
only when the upload is complete.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import SCHEME, S3Object, S3Path, object_sizes, write_object

PARTIAL = ".partial"
DAMAGED = ".damaged"

_BLOCK_BYTES = 1 << 20


def parse_location(text: object) -> Path | S3Path:
    """Parse a file system path, or an S3 path if the text begins with ``s3://``.

    Raises:
        ValueError: Empty text, another type, a ``pipe:`` command, or a URL of another scheme.
    """
    if isinstance(text, Path | S3Path):
        return text
    if not isinstance(text, str) or not text:
        raise ValueError(f"given {text!r}, allowed: a path, or s3://bucket/key")
    if text.startswith(SCHEME):
        return S3Path.parse(text)
    if text.startswith("pipe:") or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text):
        raise ValueError(f"given {text!r}, allowed: a path, or s3://bucket/key; commands are never run")
    return Path(text)


Location = Annotated[Path | S3Path, PlainValidator(parse_location), PlainSerializer(str)]
"""Path of a file or folder, on the file system or in S3; serialized as a string in configurations."""


@contextmanager
def published(path: Location, *, shared: bool = False) -> Generator[Path]:
    """Yield a temporary path to write to; rename it atomically to ``path`` on success, delete it on failure.

    Args:
        path: Final path of the file.
        shared: Allow concurrent writers; the last one wins. Each writer's partial file then has a unique
            name, and later writers do not replace one that a kill left behind: for small files only.

    Raises:
        UserError: The disk is full, the folder is read-only, or permission is denied; the S3 store cannot be
            reached or refuses.
    """
    if isinstance(path, S3Path):
        with tempfile.TemporaryDirectory(prefix="vqd-scale-") as folder:
            partial = Path(folder) / path.name
            with writing(partial):
                yield partial
            write_object(path, partial)
        return
    suffix = f".{secrets.token_hex(8)}" if shared else ""
    partial = path.with_name(path.name + suffix + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync_to_disk(partial)
            # A process that waits for the file may rename the folder as soon as the file appears.
            with _synced_after(path.parent):
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def published_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder to fill; rename it to ``path`` on success, delete it on failure.

    An existing folder at ``path`` is deleted before the rename.

    Raises:
        UserError: The disk is full, the parent folder is read-only, or permission is denied.
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
    """Convert OS errors that a user can fix (full disk, missing permission) to a `UserError` naming ``path``.

    Raises:
        UserError: The operating system refused the write.
    """
    reasons = {
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
        if error.errno not in reasons:
            raise
        raise UserError(f"{path}: cannot be written: {reasons[error.errno]}.") from None


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to ``NAME.damaged``, or ``NAME.damaged-2`` and so on; return the path.

    Raises:
        UserError: The parent folder is read-only, or permission is denied.
    """
    names = chain([path.name + DAMAGED], (f"{path.name}{DAMAGED}-{number}" for number in count(2)))
    target = next(target for target in map(path.with_name, names) if not target.exists())
    with writing(path):
        return path.rename(target)


def publish_text(path: Location, text: str, *, shared: bool = False) -> None:
    """Write a small text file atomically; ``shared`` as for `published`.

    Raises:
        UserError: See `published`.
    """
    with published(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_json(
    path: Location,
    value: Any,  # noqa: ANN401 - whatever JSON can hold
    *,
    shared: bool = False,
) -> None:
    """Write a JSON file atomically; ``shared`` as for `published`.

    Raises:
        UserError: See `published`.
    """
    publish_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", shared=shared)


def read_json(path: Location, kind: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Read a JSON file; ``kind`` is the kind of file named in error messages.

    Raises:
        UserError: The file is missing, unreadable or invalid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {kind} here.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this {kind} cannot be read ({error}).") from None


def file_sizes(folder: Location) -> dict[str, int]:
    """Return the size in bytes of each file directly in a folder, by name; empty if the folder is missing.

    Raises:
        UserError: The store cannot be reached or refuses.
    """
    if isinstance(folder, S3Path):
        return object_sizes(folder)
    if not folder.is_dir():
        return {}
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Other processes may rename or delete files during the scan.
            with suppress(FileNotFoundError):
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def read_in_order(path: Location) -> Iterator[bytes]:
    """Yield a file's bytes in order, in blocks of any length.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The store cannot be reached or refuses.
    """
    if isinstance(path, S3Path):
        yield from S3Object(path).blocks()
        return
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def sha256_of(path: Location) -> str:
    """Return the hex SHA-256 digest of a file; raises what `read_in_order` raises."""
    digest = hashlib.sha256()
    for block in read_in_order(path):
        digest.update(block)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk (fsync)."""
    with _synced_after(path):
        pass


@contextmanager
def _synced_after(path: Path) -> Generator[None]:
    """Open ``path`` before the ``with`` body and fsync it afterwards, even if the body renamed it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
