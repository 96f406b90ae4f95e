"""Files that are published, not written: nothing half-written is ever taken for whole.

On a file system, a file is written beside its place under a name that nobody reads, flushed to the disk, and
renamed. What a full disk or a kill leaves behind is a ``*.partial`` file, which readers ignore and the next
writer replaces. In S3, it is written to a temporary file here, and then uploaded: an object appears whole.
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
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import SCHEME, S3Object, S3Path, object_sizes, write_object

PARTIAL = ".partial"

_BLOCK_BYTES = 1 << 20


def parse_location(text: object) -> Path | S3Path:
    """A path of the file system, or of S3 where it begins with ``s3://``.

    Raises:
        ValueError: It is neither; ``pipe:`` is a shell command, and no other scheme is known.
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
"""Where a file or a folder lies; in configurations, a string."""


@contextmanager
def published(path: Location, *, shared: bool = False) -> Generator[Path]:
    """Give a path to write to; on success the file appears at ``path`` at once, on failure not at all.

    Args:
        path: The file.
        shared: Whether several processes may write it at the same time: the last one wins. What a kill leaves
            behind then has a name of its own and is not replaced, hence for small files only.

    Raises:
        UserError: The disk is full, the folder is read-only or missing rights; the store cannot be reached or
            refuses.
    """
    if isinstance(path, S3Path):
        with tempfile.TemporaryDirectory(prefix="vqd-scale-") as folder:
            partial = Path(folder) / path.name
            with writing(partial):
                yield partial
            write_object(path, partial)
        return
    own = f".{secrets.token_hex(8)}" if shared else ""
    partial = path.with_name(path.name + own + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync_to_disk(partial)
            # Whoever waits for the file may rename its folder as soon as it appears.
            with _synced_after(path.parent):
                partial.replace(path)
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


def publish_text(path: Location, text: str, *, shared: bool = False) -> None:
    """Write a small text file at once; ``shared`` as for `published`.

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
    """Write a JSON file at once; ``shared`` as for `published`.

    Raises:
        UserError: See `published`.
    """
    publish_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", shared=shared)


def read_json(path: Location, what: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
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


def file_sizes(folder: Location) -> dict[str, int]:
    """Bytes of each file directly in a folder, by name; empty where there is no such folder.

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
            # Others may publish or delete meanwhile.
            with suppress(FileNotFoundError):
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def read_in_order(path: Location) -> Iterator[bytes]:
    """A file's bytes from the first to the last, in blocks of any length.

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
    """Hex SHA-256 of a file's bytes; raises what `read_in_order` raises."""
    digest = hashlib.sha256()
    for block in read_in_order(path):
        digest.update(block)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    with _synced_after(path):
        pass


@contextmanager
def _synced_after(path: Path) -> Generator[None]:
    """Do something, then `sync_to_disk` what was at ``path`` before, under whatever name it is by then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
