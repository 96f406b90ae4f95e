"""What a set of shards holds: a small table of the set, and a table per shard.

A set is a folder with ``index.json``, which lists the shards with their counts, sizes and digests and holds
what the set's maker wants remembered (``meta``); it is marked complete only when everything else is there.
For each ``NAME.tar`` there is ``NAME.npz``: where each member of each sample begins and how long it is, so
that any sample is one ranged read away. The tars lie beside their tables or, where they are somebody else's,
in a folder that the index names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, cast, overload
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, file_sizes, parse_location, publish_json, published, read_json
from vqd_scale.core.errors import UserError

INDEX = "index.json"
ABSENT = -1


@dataclass(frozen=True)
class Shard:
    """One tar of a set.

    Attributes:
        path: The tar.
        table: Its table.
        count: Samples in its table.
        size: Bytes of the tar.
        sha256: Digest of the tar; empty where it was indexed without being read whole.
    """

    path: Location
    table: Location
    count: int
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardTable:
    """Where everything lies in one shard.

    Attributes:
        keys: The samples' keys in the tar's order, UTF-8.
        extensions: Every member extension that occurs, sorted.
        offsets: First byte of each member's content; `ABSENT` where a sample lacks the member.
        sizes: Bytes of each member's content; `ABSENT` likewise.
        columns: What was kept of the samples' ``json``: ``captions`` (how many), ``class`` (its number); nan
            where it does not say. A sample that lists no captions has the one in its ``txt``.
    """

    keys: Shaped[NDArray[np.bytes_], " count"]
    extensions: tuple[str, ...]
    offsets: Int64[NDArray[np.int64], "count extensions"]
    sizes: Int64[NDArray[np.int64], "count extensions"]
    columns: Mapping[str, Float64[NDArray[np.float64], " count"]]


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is in a source but not in the set.

    Attributes:
        key: Which one; empty for what concerns a shard as a whole.
        reason: Completes the sentence 'this sample …'.
        is_bad: Whether it could not be used, rather than was not wanted.
    """

    key: str
    reason: str
    is_bad: bool = True


@dataclass(frozen=True)
class IndexedShard:
    """What indexing a tar found out about it.

    Attributes:
        name: The tar's file name.
        count: Samples in its table.
        size: Bytes of the tar.
        sha256: Digest of the tar; empty where it was not read whole.
        captions: Captions of its samples, several of which one sample may have.
        filtered: Samples that filters left out.
        left_out: Others that were left out, each with its reason.
        version: What changes when somebody replaces the tar; empty for tars of our own, which are hashed.
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
    """A complete set of shards, in the order of their names.

    Columns rather than a list of shards: LAION-400M's 41,408 shards are opened by every rank.

    Attributes:
        folder: Where the index is.
        tars: Where the tars are.
        names: The tars' file names.
        counts: Samples in each shard.
        sizes: Bytes of each tar.
        digests: SHA-256 of each tar; empty where unknown.
        captions: Captions in each shard.
        meta: What the set's maker wants remembered.
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
        """Samples in all shards together."""
        return sum(self.counts)

    @property
    def shards(self) -> Sequence[Shard]:
        """The shards, made when they are asked for."""
        return _Shards(self)

    @classmethod
    def open(cls, folder: Location, *, look: bool = True) -> "ShardSet":
        """Read a set's index and see that its shards are there, whole.

        Args:
            folder: Where the index is.
            look: Whether to look at every tar's size. One of many ranks that open a set is enough: a shard is
                looked at again when it is read.

        Raises:
            UserError: There is no set, it is half-made or empty, or a shard is missing or has another size.
        """
        index = read_index(folder)
        if index is None:
            raise UserError(f"{folder}: no set of shards is here; make_shards.py makes or indexes one.")
        if not index["complete"]:
            raise UserError(
                f"{folder}: this set of shards is half-made; run the command that makes it again."
            )
        tars = folder if index["tars"] is None else parse_location(index["tars"])
        columns = [tuple(index["shards"][name]) for name in ("name", "count", "size", "sha256", "captions")]
        opened = cls(folder, tars, *columns, meta=index["meta"])
        if opened.count == 0:
            raise UserError(f"{folder}: this set of shards holds no sample.")
        if look:
            opened._look()
        return opened

    def _look(self) -> None:
        present = file_sizes(self.tars)
        for name, size in zip(self.names, self.sizes, strict=True):
            if present.get(name) != size:
                raise UserError(
                    f"{self.tars / name}: missing or changed since it was indexed; make the set again."
                )


class _Shards(Sequence[Shard]):
    def __init__(self, shards: ShardSet) -> None:
        self._set = shards

    def __len__(self) -> int:
        return len(self._set.names)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Shard]: ...

    def __getitem__(self, number: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(number, slice):
            return [self[single] for single in range(*number.indices(len(self)))]
        of = self._set
        name = of.names[number]
        return Shard(
            of.tars / name,
            of.folder / table_name(name),
            of.counts[number],
            of.sizes[number],
            of.digests[number],
        )


def table_name(tar: str) -> str:
    """The file name of a tar's table."""
    return tar.removesuffix(".tar") + ".npz"


def read_index(folder: Location) -> dict[str, Any] | None:
    """The index of a set as it is on disk; None where there is none.

    Raises:
        UserError: What is there is no index.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    index = read_json(path, "index of a set of shards")
    if not isinstance(index, dict) or not {"complete", "tars", "meta", "shards"} <= set(
        cast("dict[str, Any]", index)
    ):
        raise UserError(f"{path}: not the index of a set of shards; name another folder.")
    return cast("dict[str, Any]", index)


def is_complete(folder: Location) -> bool:
    """Whether a set is there whose shards are all written.

    Raises:
        UserError: What is there is no index.
    """
    index = read_index(folder)
    return index is not None and index["complete"]


def begin_set(folder: Location, meta: Mapping[str, Any], tars: Location | None = None) -> None:
    """Say in the folder what is being made there, before its first shard.

    Args:
        folder: Where the set is to be.
        meta: What its maker wants remembered.
        tars: Where the tars are, if not in the folder.

    Raises:
        UserError: The folder already holds a set with another ``meta`` or of other tars, or cannot be
            written.
    """
    index = read_index(folder)
    elsewhere = None if tars is None or tars == folder else str(tars)
    if index is None:
        _publish_index(folder, complete=False, tars=elsewhere, meta=meta, shards=())
        return
    before = {"tars": index["tars"], **index["meta"]}
    if difference := _difference(before, {"tars": elsewhere, **json.loads(json.dumps(meta))}):
        raise UserError(
            f"{folder}: holds another set of shards ({difference}); name another folder or delete it."
        )


def finish_set(
    folder: Location, meta: Mapping[str, Any], shards: Sequence[IndexedShard], tars: Location | None = None
) -> ShardSet:
    """Publish the index of a set whose shards are all written.

    Raises:
        UserError: The folder cannot be written, or the set is empty.
    """
    elsewhere = None if tars is None or tars == folder else str(tars)
    _publish_index(folder, complete=True, tars=elsewhere, meta=meta, shards=shards)
    return ShardSet.open(folder)


def publish_table(path: Location, table: ShardTable, found: IndexedShard) -> None:
    """Publish a shard's table, with what else indexing found.

    Raises:
        UserError: It cannot be written.
    """
    # Not through a path: numpy would append its own suffix to the unpublished name.
    with published(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            keys=table.keys,
            extensions=_text_array(table.extensions),
            offsets=table.offsets,
            sizes=table.sizes,
            shard_size=np.int64(found.size),
            shard_sha256=np.array(found.sha256),
            version=np.array(found.version),
            captions=np.int64(found.captions),
            filtered=np.int64(found.filtered),
            left_out_keys=_text_array([left.key for left in found.left_out]),
            left_out_reasons=_text_array([left.reason for left in found.left_out]),
            left_out_bad=np.array([left.is_bad for left in found.left_out], dtype=np.bool_),
            column_names=_text_array(list(table.columns)),
            columns=np.array(list(table.columns.values()), dtype=np.float64),
        )


def read_table(shard: Shard) -> ShardTable:
    """Read a shard's table.

    Raises:
        UserError: The table is missing, damaged, or another shard's.
    """
    arrays = _read_arrays(shard.table)
    if str(arrays["shard_sha256"]) != shard.sha256 or len(arrays["keys"]) != shard.count:
        raise UserError(f"{shard.table}: not the table of this set's shard; make the set again.")
    return ShardTable(
        keys=arrays["keys"],
        extensions=tuple(decoded(extension) for extension in arrays["extensions"].tolist()),
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
        columns={
            decoded(name): column
            for name, column in zip(arrays["column_names"].tolist(), arrays["columns"], strict=True)
        },
    )


def read_indexed(name: str, table: Location) -> IndexedShard:
    """What was found out about a tar when its table was made.

    Raises:
        UserError: The table is missing or damaged.
    """
    arrays = _read_arrays(table)
    left_out = zip(
        arrays["left_out_keys"].tolist(),
        arrays["left_out_reasons"].tolist(),
        arrays["left_out_bad"].tolist(),
        strict=True,
    )
    return IndexedShard(
        name,
        len(arrays["keys"]),
        int(arrays["shard_size"]),
        str(arrays["shard_sha256"]),
        int(arrays["captions"]),
        int(arrays["filtered"]),
        tuple(SkippedSample(decoded(key), decoded(reason), is_bad) for key, reason, is_bad in left_out),
        str(arrays["version"]),
    )


def table_of(
    samples: Sequence[tuple[str, Mapping[str, tuple[int, int]], Mapping[str, float]]],
) -> ShardTable:
    """The table of samples: key, place of each member's content by extension, columns."""
    extensions = sorted({extension for _, places, _ in samples for extension in places})
    numbers = {extension: number for number, extension in enumerate(extensions)}
    found = np.full((len(samples), len(extensions), 2), ABSENT, dtype=np.int64)
    for row, (_, places, _) in enumerate(samples):
        for extension, place in places.items():
            found[row, numbers[extension]] = place
    names = sorted({name for _, _, columns in samples for name in columns})
    return ShardTable(
        _text_array([key for key, _, _ in samples]),
        tuple(extensions),
        found[..., 0],
        found[..., 1],
        {
            name: np.array([columns.get(name, np.nan) for _, _, columns in samples], dtype=np.float64)
            for name in names
        },
    )


def decoded(name: bytes) -> str:
    """A name as a table holds it; what is not UTF-8 in it survives the way back."""
    return name.decode("utf-8", "surrogateescape")


def _publish_index(
    folder: Location,
    *,
    complete: bool,
    tars: str | None,
    meta: Mapping[str, Any],
    shards: Sequence[IndexedShard],
) -> None:
    columns = {
        "name": [shard.name for shard in shards],
        "count": [shard.count for shard in shards],
        "size": [shard.size for shard in shards],
        "sha256": [shard.sha256 for shard in shards],
        "captions": [shard.captions for shard in shards],
    }
    left_out = [left for shard in shards for left in shard.left_out]
    counts = {
        "bad": sum(left.is_bad for left in left_out),
        "near_duplicates": sum(not left.is_bad for left in left_out),
        "filtered": sum(shard.filtered for shard in shards),
    }
    index = {"complete": complete, "tars": tars, "meta": meta, "shards": columns, "left_out": counts}
    # Several processes may begin or finish one set at the same time.
    publish_json(folder / INDEX, index, shared=True)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    """The first key in which two metas differ, as 'key was A, now is B'; empty if they are equal."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            before, now = cast("dict[str, Any]", before), cast("dict[str, Any]", now)
            if inner := _difference(before, now, f"{path}{key}."):
                return inner
        elif before != now:
            return f"{path}{key} was {before!r}, now is {now!r}"
    return ""


def _read_arrays(table: Location) -> dict[str, NDArray[Any]]:
    try:
        with np.load(BytesIO(table.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{table}: this shard's table cannot be read ({error}); delete it and make it again."
        ) from None


def _text_array(texts: Sequence[str]) -> Shaped[NDArray[np.bytes_], " count"]:
    # surrogateescape: a foreign tar may name its members in any encoding.
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], dtype=np.bytes_)
