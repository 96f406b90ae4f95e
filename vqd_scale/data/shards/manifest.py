"""Manifest of a sharded dataset, ``index.json``: its shards, the folder of their tars, and any metadata."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from vqd_scale.core.atomic_io import Location, parse_location, publish_json, read_json, reading
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path

INDEX = "index.json"

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
"""Number of samples, captions or bytes."""
TarName = Annotated[str, Field(pattern=r"^[^/\\\x00]+\.tar$")]
"""File name of a tar."""


@dataclass(frozen=True)
class ManifestColumns:
    """Columns of a manifest: the entries of `IndexedShard` of this name, for all shards."""

    name: tuple[TarName, ...]
    count: tuple[Count, ...]
    size: tuple[Count, ...]
    sha256: tuple[str, ...]
    captions: tuple[Count, ...]
    version: tuple[str, ...]
    table_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of ``index.json``.

    Attributes:
        complete: Flag for a dataset whose shards are all written.
        tars: Folder of the tars, relative to the manifest and absolute; None if it is the manifest's own.
        meta: Free-form metadata.
        shards: Entries of the shards.
        left_out: Number of skipped samples by kind.
        sha256: Digest of the other entries.
    """

    complete: bool
    tars: tuple[str, ...] | None
    meta: dict[str, Any]
    shards: ManifestColumns
    left_out: dict[str, Count]
    sha256: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of all entries but ``sha256``."""
        content = json.dumps(asdict(replace(self, sha256="")), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def tars_folder(self, folder: Location) -> Location:
        """Return the folder of the tars, for the manifest in ``folder``: the relative one, if it exists.

        So an index can be used from any folder, and moved alone or together with its tars.

        Raises:
            UserError: A path of the manifest is not allowed.
        """
        if self.tars is None:
            return folder
        try:
            candidates = [parse_location(text) for text in self.tars]
        except ValueError as error:
            raise UserError(f"{folder / INDEX}: {error}.") from None
        if isinstance(folder, Path):
            candidates = [_resolved(path, folder) if isinstance(path, Path) else path for path in candidates]
        existing = (path for path in candidates if isinstance(path, Path) and path.is_dir())
        return next(existing, candidates[-1])

    def publish(self, folder: Location) -> None:
        """Publish the manifest with its digest; several processes may publish one at the same time."""
        publish_json(folder / INDEX, asdict(replace(self, sha256=self.digest)), shared=True)


COLUMNS = tuple(entry.name for entry in fields(ManifestColumns))
_MANIFEST = TypeAdapter(Manifest)


def read_index(folder: Location) -> Manifest | None:
    """Read the manifest of a dataset; None if there is none.

    Raises:
        UserError: The file is not a manifest, is damaged, or may not be read.
    """
    path = folder / INDEX
    with reading(path):
        if not path.exists():
            return None
    index = read_json(path, "index of a set of shards", _MANIFEST)
    counts = {len(getattr(index.shards, name)) for name in COLUMNS}
    if index.sha256 != index.digest or len(counts) > 1:
        raise UserError(
            f"{path}: damaged, or changed by hand; move it away and run the command that made it again."
        )
    return index


def tars_entry(tars: Location | None, folder: Location) -> tuple[str, ...] | None:
    """Return the manifest's entry for the tars: their folder, if it is not the dataset's own."""
    if tars is None or tars == folder:
        return None
    path = absolute(tars)
    if isinstance(path, S3Path) or isinstance(folder, S3Path):
        return (str(path),)
    return os.path.relpath(path, _resolved(folder, Path())), str(path)


def absolute(path: Location) -> Location:
    """Return a path that does not depend on the current folder."""
    return path if isinstance(path, S3Path) else _resolved(path, Path())


def _resolved(path: Path, folder: Path) -> Path:
    """Return an absolute path; one with a NUL, which the operating system refuses, as it is."""
    return path if "\0" in str(path) else (folder / path).resolve()
