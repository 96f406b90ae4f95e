"""Index of a sharded dataset: one manifest per dataset and one table per shard.

A dataset is a folder with the manifest ``index.json`` (`Manifest`), which is marked complete last.
For each ``NAME.tar`` there is a table ``NAME.npz`` with offset, size and checksum of each member of each
sample, so that any sample takes one range request. The tars lie beside their tables or, for third-party tars,
in a folder named in the manifest.

What is read is what was indexed: the manifest has a digest of itself and of each table, and a table has a
checksum of each member's header and content.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, file_sizes
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import differences
from vqd_scale.core.outputs import check_output
from vqd_scale.core.s3 import S3Path
from vqd_scale.data.shards.manifest import (
    COLUMNS,
    INDEX,
    Count,
    Manifest,
    ManifestColumns,
    TarName,
    absolute,
    read_index,
    tars_entry,
)
from vqd_scale.data.shards.quarantine import escaped


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset.

    Attributes:
        path: Path of the tar.
        table: Path of the table.
        count: Number of samples in the table.
        size: Size of the tar in bytes.
        sha256: Digest of the tar; empty if it was indexed without reading all its bytes.
        captions: Number of captions.
        version: See `IndexedShard`.
        table_sha256: Digest of the table.
    """

    path: Location
    table: Location
    count: int
    size: int
    sha256: str
    captions: int
    version: str
    table_sha256: str

    @property
    def etag(self) -> str | None:
        """ETag that the object must have, because its contents have no checksum; None if they have."""
        return self.version.partition(" ")[2] if isinstance(self.path, S3Path) and not self.sha256 else None


@dataclass(frozen=True)
class SkippedSample:
    """Sample of a source that is not in the dataset.

    Attributes:
        key: Key of the sample; empty for damage to a whole shard. Bytes that are not UTF-8 are escaped.
        reason: Reason, completing the sentence 'this sample …'.
        is_bad: True if the sample is unusable, false if it was excluded as a near-duplicate.
        count: Number of samples, not understated, that damage to a shard may have cost.
    """

    key: str
    reason: str
    is_bad: bool = True
    count: Count = 1

    def __post_init__(self) -> None:
        for name in ("key", "reason"):
            object.__setattr__(self, name, escaped(getattr(self, name)))


@dataclass(frozen=True)
class IndexedShard:
    """Result of indexing one tar.

    Attributes:
        name: File name of the tar.
        count: Number of samples in the table.
        size: Size of the tar in bytes.
        sha256: Digest of the tar; empty if not all its bytes were read.
        captions: Total number of captions; a sample may have several.
        filtered: Number of samples rejected by filters.
        left_out: Samples skipped for other reasons.
        version: Size and times, or in S3 the ETag, of a third-party tar. If they are unchanged, the tar is
            not indexed again. Empty for tars written by this package, which are hashed.
        table_sha256: Digest of the table; empty in the table itself.
    """

    name: TarName
    count: Count
    size: Count
    sha256: str
    captions: Count
    filtered: Count = 0
    left_out: tuple[SkippedSample, ...] = ()
    version: str = ""
    table_sha256: str = ""

    def shard(self, folder: Location, tars: Location) -> Shard:
        """Return the shard, of a table in ``folder``."""
        return _shard(folder, tars, *(getattr(self, name) for name in COLUMNS))


@dataclass(frozen=True)
class ShardSet:
    """Complete sharded dataset, with shards sorted by name.

    Stored as columns, not as a list of shards: every rank opens the index, for LAION-400M with 41,408 shards.

    Attributes:
        folder: Folder of the index.
        tars: Folder of the tars.
        names: File names of the tars.
        counts: Number of samples in each shard.
        sizes: Size of each tar in bytes.
        digests: SHA-256 of each tar; empty if unknown.
        captions: Number of captions in each shard.
        versions: Version of each tar, as in `IndexedShard`.
        table_digests: SHA-256 of each table.
        meta: Free-form metadata.
    """

    folder: Location
    tars: Location
    names: tuple[str, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    captions: tuple[int, ...]
    versions: tuple[str, ...]
    table_digests: tuple[str, ...]
    meta: Mapping[str, Any] = field(hash=False)

    @property
    def count(self) -> int:
        """Total number of samples."""
        return sum(self.counts)

    @property
    def shards(self) -> list[Shard]:
        """All shards; `shard` returns one of them without building the others."""
        return [self.shard(number) for number in range(len(self.names))]

    def shard(self, number: int) -> Shard:
        """Return a shard by its number."""
        columns: list[tuple[Any, ...]] = [self.names, self.counts, self.sizes, self.digests, self.captions]
        columns += [self.versions, self.table_digests]
        return _shard(self.folder, self.tars, *(column[number] for column in columns))

    def locate(self, members: Int64[NDArray[np.int64], " samples"]) -> tuple[NDArray[np.int64], ...]:
        """Convert sample indices in the dataset to shard numbers and sample indices in the shards."""
        ends = np.cumsum(np.asarray(self.counts, dtype=np.int64))
        numbers = np.searchsorted(ends, members, side="right")
        return numbers, members - np.concatenate([[0], ends])[numbers]

    @classmethod
    def open(cls, folder: Location, *, look: bool = True) -> "ShardSet":
        """Read a dataset's index and check that its shards exist.

        Args:
            folder: Folder of the index.
            look: Check the size of every tar. One rank is enough: each shard is checked again when it is
                read.

        Raises:
            UserError: There is no dataset, it is incomplete or empty, or a shard is missing or has another
                size.
        """
        index = read_index(folder)
        if index is None:
            raise UserError(f"{folder}: no set of shards is here; make_shards.py makes or indexes one.")
        if not index.complete:
            raise UserError(
                f"{folder}: this set of shards is half-made; run the command that makes it again."
            )
        columns = [getattr(index.shards, name) for name in COLUMNS]
        opened = cls(folder, index.tars_folder(folder), *columns, meta=index.meta)
        if opened.count == 0:
            raise UserError(f"{folder}: this set of shards holds no sample.")
        if look:
            opened.check_sizes()
        return opened

    def check_sizes(self) -> None:
        """Raise a `UserError` if a tar is missing or has another size than in the index."""
        sizes = file_sizes(self.tars)
        missing = [name for name in self.names if name not in sizes]
        if missing:
            raise UserError(
                f"{self.tars / missing[0]}: missing, as {len(missing)} of {len(self.names)} tars of "
                f"{self.folder / INDEX} are; put them back, or index their folder again."
            )
        for name, size in zip(self.names, self.sizes, strict=True):
            if sizes[name] != size:
                raise changed(self.tars / name, f"it has {sizes[name]} bytes, not {size}")


def changed(tar: Location, reason: str) -> UserError:
    """Return the error of a tar that is not the one that was indexed."""
    return UserError(
        f"{tar}: changed or damaged since it was indexed ({reason}); restore it, or run the command that "
        "indexed or made it again."
    )


def table_name(tar: str) -> str:
    """Return the file name of a tar's table."""
    return tar.removesuffix(".tar") + ".npz"


def begin_set(
    folder: Location, meta: Mapping[str, Any], tars: Location | None = None, names: Iterable[str] = ()
) -> None:
    """Publish an incomplete manifest, before the first shard is written.

    Args:
        folder: Folder of the dataset.
        meta: Free-form metadata.
        tars: Folder of the tars; None if it is ``folder``.
        names: Names of the files that will be written beside the tars.

    Raises:
        UserError: The folder already contains a dataset with another ``meta`` or other tars, or something
            else, or cannot be written.
    """
    # Listed before the index is read: another process that begins the same dataset publishes its index first.
    listed = file_sizes(folder) if isinstance(folder, S3Path) and folder != tars else names
    obstacles = sorted(name for name in listed if (folder / name).exists())
    index = read_index(folder)
    if index is None:
        if isinstance(folder, Path) and folder != tars:
            check_output(folder, "an earlier start", siblings=[INDEX])
        if obstacles:
            raise UserError(f"{folder / obstacles[0]}: is in the way; name another folder.")
        _publish_index(folder, False, tars, meta, ())
        return
    stored = {"tars": str(absolute(index.tars_folder(folder))), **index.meta}
    entries = {"tars": str(absolute(tars or folder)), **json.loads(json.dumps(meta))}
    for path, old, new in differences(stored, entries):
        raise UserError(
            f"{folder}: holds another set of shards ({path} was {old!r}, now is {new!r}); name another "
            "folder or delete it."
        )


def finish_set(
    folder: Location, meta: Mapping[str, Any], shards: Sequence[IndexedShard], tars: Location | None = None
) -> ShardSet:
    """Publish the complete manifest of a dataset whose shards are all written.

    Raises:
        UserError: The folder cannot be written, or the dataset is empty.
    """
    _publish_index(folder, True, tars, meta, shards)
    return ShardSet.open(folder)


def _shard(folder: Location, tars: Location, name: str, *entries: Any) -> Shard:  # noqa: ANN401 - of `Shard`
    return Shard(tars / name, folder / table_name(name), *entries)


def _publish_index(
    folder: Location,
    complete: bool,
    tars: Location | None,
    meta: Mapping[str, Any],
    shards: Sequence[IndexedShard],
) -> None:
    columns = ManifestColumns(*(tuple(getattr(shard, name) for shard in shards) for name in COLUMNS))
    skipped = [sample for shard in shards for sample in shard.left_out]
    counts = {
        "bad": sum(sample.count for sample in skipped if sample.is_bad),
        "near_duplicates": sum(sample.count for sample in skipped if not sample.is_bad),
        "filtered": sum(shard.filtered for shard in shards),
    }
    # As JSON has it: the digest is that of the file.
    content = json.loads(json.dumps(meta))
    Manifest(complete, tars_entry(tars, folder), content, columns, counts).publish(folder)
