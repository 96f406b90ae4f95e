"""Atomic file writes: readers never see a half-written file.

On a file system, a file is written under a unique name in the same folder, ``.NAME.vqd-*.partial``, flushed
to the disk, and renamed atomically. A kill can leave such a file; readers ignore it and the next writer
deletes it. For S3, the file is written to a local temporary folder and then uploaded; an object appears only
when the upload is complete.
"""

import errno
import glob
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
from typing import Annotated, Any, TypeVar

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import SCHEME, S3Object, S3Path, object_sizes, write_object
from vqd_scale.core.safe_json import JSON, parse_json, read_bounded
from vqd_scale.core.watchdog import beat

T = TypeVar("T")

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
        shared: Allow concurrent writers; the last one wins. Writers then do not delete a partial file that a
            kill left behind: for small files only.

    Raises:
        UserError: The path is a folder, a link or a device; the disk is full, the folder is read-only, or
            permission is denied; the S3 store cannot be reached or refuses.
    """
    if isinstance(path, S3Path):
        with tempfile.TemporaryDirectory(prefix="vqd-scale-") as folder:
            partial = Path(folder) / path.name
            with writing(partial):
                yield partial
            write_object(path, partial)
        return
    with writing(path):
        check_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path, shared=shared)
        try:
            yield partial
            sync_to_disk(partial)
            # A process that waits for the file may rename the folder as soon as the file appears.
            with _synced_after(path.parent):
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_file(path: Path) -> None:
    """Raise a `UserError` if a path is a folder, a link or a device, which no file may replace."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "device"
        raise UserError(f"{path}: cannot be written: a {kind} of this name is in the way.")


def partial_of(path: Path, *, shared: bool = False) -> Path:
    """Return a unique name beside a file or folder to be written; delete what killed writers of it left.

    Args:
        path: Final path.
        shared: Keep what other writers of the path have begun.
    """
    if not shared:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.vqd-*{PARTIAL}"):
            if is_partial(leftover.name):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.vqd-{secrets.token_hex(8)}{PARTIAL}")


def is_partial(name: str) -> bool:
    """Return whether a name is one of `partial_of`."""
    return re.fullmatch(rf"\..+\.vqd-[0-9a-f]{{16}}\{PARTIAL}", name, re.DOTALL) is not None


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
        errno.ENAMETOOLONG: "the name is too long",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise UserError(f"{path}: cannot be written: {reasons[error.errno]}.") from None


@contextmanager
def reading(path: Location) -> Generator[None]:
    """Convert OS errors other than a missing file to a `UserError` naming ``path``.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The operating system refused to read it, for example because permission is denied.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None


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
    """Write a small text file atomically; ``shared`` and errors as for `published`."""
    with published(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_json(path: Location, value: Any, *, shared: bool = False) -> None:  # noqa: ANN401 - any JSON
    """Write a JSON file atomically; ``shared`` and errors as for `published`."""
    publish_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", shared=shared)


def read_json(path: Location, kind: str, shape: TypeAdapter[T] = JSON) -> T:
    """Read a JSON file.

    Args:
        path: Path of the file.
        kind: Kind of file, named in error messages.
        shape: Expected shape, checked strictly (`parse_json`).

    Raises:
        UserError: The file is missing, unreadable, no regular file, too large, invalid JSON, or of another
            shape.
    """
    try:
        return parse_json(read_bounded(path) if isinstance(path, Path) else path.read_bytes(), shape)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no {kind} here.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this {kind} cannot be read ({error}).") from None


def file_sizes(folder: Location) -> dict[str, int]:
    """Return the size in bytes of each file directly in a folder, by name; empty if the folder is missing.

    Raises:
        UserError: The folder may not be read; the store cannot be reached or refuses.
    """
    if isinstance(folder, S3Path):
        return object_sizes(folder)
    sizes: dict[str, int] = {}
    with reading(folder):
        if not folder.is_dir():
            return {}
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
        UserError: The file may not be read; the store cannot be reached or refuses.
    """
    if isinstance(path, S3Path):
        for block in S3Object(path).blocks():
            beat()
            yield block
        return
    with reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            beat()
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
