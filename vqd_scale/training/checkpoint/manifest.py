"""Manifest of a checkpoint: its files with sizes and digests, and their verification."""

import errno
import hashlib
import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from vqd_scale.core.atomic_io import Location, read_in_order, sha256_of
from vqd_scale.core.errors import UserError

MANIFEST = "manifest.json"
Model = TypeVar("Model", bound=BaseModel)


class DamageError(UserError):
    """Damage of a checkpoint: a file is missing, or differs from the manifest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StoredFile(_Strict):
    """Name, size and SHA-256 of a file in a checkpoint."""

    name: str = Field(pattern=r"^[a-z0-9-]+\.safetensors$")
    bytes: NonNegativeInt
    sha256: str


class SlicesDescription(_Strict):
    """Description of a rank's file in a save in progress.

    Attributes:
        file: The file.
        damages: Damage of the rank's part of older checkpoints, by name; empty for valid ones.
    """

    file: StoredFile
    damages: dict[str, str]


class Manifest(_Strict):
    """Content of ``manifest.json``; ``sha256`` is the digest of the other fields."""

    format: Literal[2] = 2
    images: NonNegativeInt
    optimizer_steps: NonNegativeInt
    ranks: NonNegativeInt
    parameters: dict[str, list[NonNegativeInt]]
    files: list[StoredFile] = []
    sha256: str = ""

    def sealed(self) -> dict[str, Any]:
        """Return the fields as plain values, with their digest."""
        values = self.model_dump(exclude={"sha256"})
        return {**values, "sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def is_checkpoint(path: Path) -> bool:
    """Return whether a path has the name of a checkpoint: the images seen, in 12 digits or more."""
    return re.fullmatch("[0-9]{12,}", path.name) is not None


def read_manifest(folder: Location) -> Manifest:
    """Read and verify a checkpoint's manifest.

    Raises:
        DamageError: The manifest is missing or damaged, or has another format version.
        UserError: The manifest cannot be read.
    """
    manifest = parsed(Manifest, folder / MANIFEST)
    if manifest.sealed()["sha256"] != manifest.sha256:
        raise DamageError(f"{MANIFEST} is damaged")
    return manifest


def parsed(model: type[Model], path: Location) -> Model:
    """Read a JSON file of a checkpoint into its model.

    Raises:
        DamageError: The file is missing or damaged.
        UserError: The file cannot be read.
    """
    with _reading(path):
        return model.model_validate_json(path.read_text(encoding="utf-8"))


def verified(folder: Path, rank: int = 0, ranks: int = 1) -> Manifest:
    """Verify this rank's part of a checkpoint's files, and return the manifest.

    Raises:
        DamageError: A file is missing, or its size or digest is not that of the manifest.
        UserError: A file cannot be read.
    """
    manifest = read_manifest(folder)
    for file in manifest.files[rank::ranks]:
        path = folder / file.name
        with _reading(path):
            if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
                raise DamageError(f"{file.name} is damaged")
    return manifest


def copy_verified(source: Location, target: Path, file: StoredFile) -> None:
    """Copy a file of a checkpoint, and verify its digest on the way.

    Raises:
        DamageError: The file is missing, or its digest is not that of the manifest.
        UserError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for block in _blocks(source):
            digest.update(block)
            output.write(block)
    if digest.hexdigest() != file.sha256:
        raise DamageError(f"{file.name} is damaged")


def _blocks(path: Location) -> Iterator[bytes]:
    with _reading(path):
        yield from read_in_order(path)


@contextmanager
def _reading(path: Location) -> Generator[None]:
    """Convert errors of a missing or damaged file to `DamageError`, and other OS errors to `UserError`."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise DamageError(f"{path.name} is missing") from None
    except ValueError:
        raise DamageError(f"{path.name} is damaged, or of another version of this program") from None
    except OSError as error:
        kind = DamageError if error.errno == errno.EIO else UserError
        raise kind(f"{path}: cannot be read ({error.strerror}).") from None
