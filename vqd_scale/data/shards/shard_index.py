"""Index of a sharded dataset: one manifest per dataset and one table per shard.

A dataset is a folder with the manifest ``index.json``. The manifest lists the shards with counts, sizes and
digests, and has free-form metadata (``meta``). The manifest is marked complete last.
For each ``NAME.tar`` there is a table ``NAME.npz`` with offset and size of each member of each sample, so
that any sample takes one range request. The tars lie beside their tables or, for third-party tars, in a
folder named in the manifest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, file_sizes, parse_location, publish_json, published, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import differences
from vqd_scale.core.outputs import check_output
from vqd_scale.core.s3 import S3Path

INDEX = "index.json"
ABSENT = -1

_MANIFEST_COLUMNS = ("name", "count", "size", "sha256", "captions")


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset.

    Attributes:
        path: Path of the tar.
        table: Path of the table.
        count: Number of samples in the table.
        size: Size of the tar in bytes.
        sha256: Digest of the tar; empty if it was indexed without reading all its bytes.
    """

    path: Location
    table: Location
    count: int
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardTable:
    """Table of one shard: the position of every member.

    Attributes:
        keys: Sample keys in tar order, UTF-8.
        extensions: All member extensions that occur, sorted.
        offsets: Offset of each member's content in bytes; `ABSENT` if the sample lacks the member.
        sizes: Size of each member's content in bytes; `ABSENT` if the sample lacks the member.
        columns: Numbers from the samples' ``json``: ``captions`` (count) and ``class``; nan if missing. A
            sample that lists no captions has one, in ``txt``.
    """

    keys: Shaped[NDArray[np.bytes_], " count"]
    extensions: tuple[str, ...]
    offsets: Int64[NDArray[np.int64], "count extensions"]
    sizes: Int64[NDArray[np.int64], "count extensions"]
    columns: Mapping[str, Float64[NDArray[np.float64], " count"]]


@dataclass(frozen=True)
class SkippedSample:
    """Sample of a source that is not in the dataset.

    Attributes:
        key: Key of the sample; empty for damage to a whole shard.
        reason: Reason, completing the sentence 'this sample …'.
        is_bad: True if the sample is unusable, false if it was excluded as a near-duplicate.
    """

    key: str
    reason: str
    is_bad: bool = True


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
        version: Size and, on a file system, mtime of a third-party tar, to detect its replacement; empty for
            tars written by this package, which are hashed.
    """

    name: str
    count: int
    size: int
    sha256: str
    captions: int
    filtered: int = 0
    left_out: tuple[SkippedSample, ...] = ()
    version: str = ""


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
        meta: Free-form metadata.
    """

    folder: Location
    tars: Location
    names: tuple[str, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    captions: tuple[int, ...]
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
        name, table = self.names[number], table_name(self.names[number])
        size, digest = self.sizes[number], self.digests[number]
        return Shard(self.tars / name, self.folder / table, self.counts[number], size, digest)

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
        if not index["complete"]:
            raise UserError(
                f"{folder}: this set of shards is half-made; run the command that makes it again."
            )
        tars = folder if index["tars"] is None else parse_location(index["tars"])
        columns = [tuple(index["shards"][name]) for name in _MANIFEST_COLUMNS]
        opened = cls(folder, tars, *columns, meta=index["meta"])
        if opened.count == 0:
            raise UserError(f"{folder}: this set of shards holds no sample.")
        stored = dict(zip(opened.names, opened.sizes, strict=True))
        if look and (changed := stored.items() - file_sizes(tars).items()):
            path = tars / min(changed)[0]
            raise UserError(f"{path}: missing or changed since it was indexed; make the set again.")
        return opened


def table_name(tar: str) -> str:
    """Return the file name of a tar's table."""
    return tar.removesuffix(".tar") + ".npz"


def read_index(folder: Location) -> dict[str, Any] | None:
    """Read the manifest of a dataset; None if there is none.

    Raises:
        UserError: The file is not a manifest.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    index = read_json(path, "index of a set of shards")
    index = cast("dict[str, Any]", index if isinstance(index, dict) else {})
    if not {"complete", "tars", "meta", "shards"} <= index.keys():
        raise UserError(f"{path}: not the index of a set of shards; name another folder.")
    return index


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
    stored = {"tars": index["tars"], **index["meta"]}
    entries = {"tars": _tars_entry(tars, folder), **json.loads(json.dumps(meta))}
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


def publish_table(path: Location, table: ShardTable, indexed: IndexedShard) -> None:
    """Publish a shard's table, together with the result of indexing; errors as for `published`."""
    # Pass a file, not a path: numpy would append its own suffix to the temporary name.
    with published(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            keys=table.keys,
            extensions=_text_array(table.extensions),
            offsets=table.offsets,
            sizes=table.sizes,
            shard_size=np.int64(indexed.size),
            shard_sha256=np.array(indexed.sha256),
            version=np.array(indexed.version),
            captions=np.int64(indexed.captions),
            filtered=np.int64(indexed.filtered),
            left_out_keys=_text_array([sample.key for sample in indexed.left_out]),
            left_out_reasons=_text_array([sample.reason for sample in indexed.left_out]),
            left_out_bad=np.array([sample.is_bad for sample in indexed.left_out], dtype=np.bool_),
            column_names=_text_array(list(table.columns)),
            columns=np.array(list(table.columns.values()), dtype=np.float64),
        )


def read_table(shard: Shard) -> ShardTable:
    """Read a shard's table.

    Raises:
        UserError: The table is missing, damaged, or belongs to another shard.
    """
    arrays = _read_arrays(shard.table)
    if str(arrays["shard_sha256"]) != shard.sha256 or len(arrays["keys"]) != shard.count:
        raise UserError(f"{shard.table}: not the table of this set's shard; make the set again.")
    extensions = tuple(map(decoded, arrays["extensions"].tolist()))
    columns = dict(zip(map(decoded, arrays["column_names"].tolist()), arrays["columns"], strict=True))
    return ShardTable(arrays["keys"], extensions, arrays["offsets"], arrays["sizes"], columns)


def read_indexed(name: str, table: Location) -> IndexedShard:
    """Read the result of indexing a tar from its table.

    Raises:
        UserError: The table is missing or damaged.
    """
    arrays = _read_arrays(table)
    keys, reasons = (map(decoded, arrays[f"left_out_{entry}"].tolist()) for entry in ("keys", "reasons"))
    left_out = tuple(map(SkippedSample, keys, reasons, arrays["left_out_bad"].tolist()))
    size, captions, filtered = (int(arrays[entry]) for entry in ("shard_size", "captions", "filtered"))
    digest, version = str(arrays["shard_sha256"]), str(arrays["version"])
    return IndexedShard(name, len(arrays["keys"]), size, digest, captions, filtered, left_out, version)


def table_of(
    samples: Sequence[tuple[str, Mapping[str, tuple[int, int]], Mapping[str, float]]],
) -> ShardTable:
    """Build a table from samples: key, (offset, size) of each member by extension, columns."""
    extensions = sorted({extension for _, members, _ in samples for extension in members})
    numbers = {extension: number for number, extension in enumerate(extensions)}
    locations = np.full((len(samples), len(extensions), 2), ABSENT, dtype=np.int64)
    for row, (_, members, _) in enumerate(samples):
        for extension, location in members.items():
            locations[row, numbers[extension]] = location
    names = sorted({name for _, _, columns in samples for name in columns})
    values = {
        name: np.array([columns.get(name, np.nan) for _, _, columns in samples], dtype=np.float64)
        for name in names
    }
    keys = _text_array([key for key, _, _ in samples])
    return ShardTable(keys, tuple(extensions), locations[..., 0], locations[..., 1], values)


def decoded(name: bytes) -> str:
    """Decode a name of a table; bytes that are not UTF-8 survive a round trip."""
    return name.decode("utf-8", "surrogateescape")


def _tars_entry(tars: Location | None, folder: Location) -> str | None:
    """Return the manifest's entry for the tars: their folder, if it is not the dataset's own."""
    return None if tars is None or tars == folder else str(tars)


def _publish_index(
    folder: Location,
    complete: bool,
    tars: Location | None,
    meta: Mapping[str, Any],
    shards: Sequence[IndexedShard],
) -> None:
    columns = {name: [getattr(shard, name) for shard in shards] for name in _MANIFEST_COLUMNS}
    skipped = [sample for shard in shards for sample in shard.left_out]
    counts = {
        "bad": sum(sample.is_bad for sample in skipped),
        "near_duplicates": sum(not sample.is_bad for sample in skipped),
        "filtered": sum(shard.filtered for shard in shards),
    }
    place = _tars_entry(tars, folder)
    index = {"complete": complete, "tars": place, "meta": meta, "shards": columns, "left_out": counts}
    # Several processes may begin or finish one dataset at the same time.
    publish_json(folder / INDEX, index, shared=True)


def _read_arrays(table: Location) -> dict[str, NDArray[Any]]:
    try:
        with np.load(BytesIO(table.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{table}: this shard's table cannot be read ({error}); delete it and make it again."
        ) from None


def _text_array(texts: Sequence[str]) -> Shaped[NDArray[np.bytes_], " count"]:
    # surrogateescape: member names of a third-party tar may have any encoding.
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], dtype=np.bytes_)
