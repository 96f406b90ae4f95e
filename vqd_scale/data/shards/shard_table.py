"""Table of a shard, ``NAME.npz``: the position of every member, and the result of indexing the tar.

A table is an uncompressed npz file, parsed without trust in any size that it states.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt32
from pydantic import TypeAdapter

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, published
from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import parse_json, read_bounded
from vqd_scale.data.shards.decode import BadSample, decode_array
from vqd_scale.data.shards.shard_index import IndexedShard, Shard
from vqd_scale.data.shards.tar_header import BLOCK
from vqd_scale.data.shards.tar_scanner import Position

ABSENT = -1

_TABLE_ERRORS = (BadSample, BadZipFile, EOFError, KeyError, OSError, RuntimeError, ValueError, struct.error)
"""Errors of `ZipFile`, and of the checks, for a file that is not a table."""
_INDEXED_SHARD = TypeAdapter(IndexedShard)


@dataclass(frozen=True)
class ShardTable:
    """Table of one shard: the position of every member.

    Attributes:
        keys: Sample keys in tar order, UTF-8.
        extensions: All member extensions that occur, sorted.
        offsets: Offset of each member's content in bytes; `ABSENT` if the sample lacks the member.
        sizes: Size of each member's content in bytes; `ABSENT` if the sample lacks the member.
        checksums: See `Position`.
        columns: Numbers from the samples' ``json``: ``captions`` (count) and ``class``; nan if missing. A
            sample that lists no captions has one, in ``txt``.
    """

    keys: Shaped[NDArray[np.bytes_], " count"]
    extensions: tuple[str, ...]
    offsets: Int64[NDArray[np.int64], "count extensions"]
    sizes: Int64[NDArray[np.int64], "count extensions"]
    checksums: UInt32[NDArray[np.uint32], "count extensions"]
    columns: Mapping[str, Float64[NDArray[np.float64], " count"]]


def publish_table(path: Location, table: ShardTable, indexed: IndexedShard) -> IndexedShard:
    """Publish a shard's table, together with the result of indexing, and return it with the table's digest.

    Raises:
        UserError: As for `published`.
    """
    content = BytesIO()
    np.savez(
        content,
        keys=table.keys,
        extensions=_text_array(table.extensions),
        offsets=table.offsets,
        sizes=table.sizes,
        checksums=table.checksums,
        column_names=_text_array(list(table.columns)),
        columns=np.array(list(table.columns.values()), np.float64).reshape(
            len(table.columns), len(table.keys)
        ),
        indexed=np.frombuffer(json.dumps(asdict(indexed)).encode(), np.uint8),
    )
    with published(path) as partial:
        partial.write_bytes(content.getvalue())
    return replace(indexed, table_sha256=hashlib.sha256(content.getvalue()).hexdigest())


def read_table(shard: Shard) -> ShardTable:
    """Read a shard's table.

    Raises:
        UserError: The table is missing, damaged, or belongs to another shard.
    """
    table, indexed = _read_table(shard.table)
    folder, tars = shard.table.parent, shard.path.parent
    if indexed.shard(folder, tars) != shard:
        raise UserError(
            f"{shard.table}: changed or damaged since the set was made; restore it, or run the command that "
            "made the set again."
        )
    return table


def read_indexed(name: str, table: Location) -> IndexedShard:
    """Read the result of indexing a tar from its table.

    Raises:
        UserError: The table is missing or damaged, or another file.
    """
    _, indexed = _read_table(table)
    if indexed.name != name:
        raise UserError(f"{table}: the table of {indexed.name}; move it away, or name another folder.")
    return indexed


def table_of(
    samples: Sequence[tuple[str, Mapping[str, Position], Mapping[str, float]]],
) -> ShardTable:
    """Build a table from samples: key, position of each member by extension, columns."""
    extensions = sorted({extension for _, members, _ in samples for extension in members})
    numbers = {extension: number for number, extension in enumerate(extensions)}
    locations = np.full((len(samples), len(extensions), 3), (ABSENT, ABSENT, 0), dtype=np.int64)
    for row, (_, members, _) in enumerate(samples):
        for extension, position in members.items():
            locations[row, numbers[extension]] = position
    names = sorted({name for _, _, columns in samples for name in columns})
    values = {
        name: np.array([columns.get(name, np.nan) for _, _, columns in samples], dtype=np.float64)
        for name in names
    }
    keys = _text_array([key for key, _, _ in samples])
    checksums = locations[..., 2].astype(np.uint32)
    return ShardTable(keys, tuple(extensions), locations[..., 0], locations[..., 1], checksums, values)


def decoded(name: bytes) -> str:
    """Decode a name of a table; bytes that are not UTF-8 survive a round trip."""
    return name.decode("utf-8", "surrogateescape")


def _read_table(path: Location) -> tuple[ShardTable, IndexedShard]:
    try:
        content = read_bounded(path) if isinstance(path, Path) else path.read_bytes()
        table, indexed = _parsed_table(content)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, although the index lists it; make the index again.") from None
    except _TABLE_ERRORS as error:
        raise UserError(
            f"{path}: not a readable table of a shard ({error}); move it away and run the command that made "
            "the index again, or name another folder."
        ) from None
    return table, replace(indexed, table_sha256=hashlib.sha256(content).hexdigest())


def _parsed_table(content: bytes) -> tuple[ShardTable, IndexedShard]:
    """Parse a table; nothing larger than the file is allocated.

    Raises:
        BadZipFile, ValueError, …: One of `_TABLE_ERRORS`.
    """
    names = ("keys", "extensions", "offsets", "sizes", "checksums", "column_names", "columns", "indexed")
    with ZipFile(BytesIO(content)) as archive:
        if any(info.compress_type != ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed")
        arrays = [decode_array(archive.read(f"{name}.npy")) for name in names]
    keys, extensions, offsets, sizes, checksums, column_names, columns, row = arrays
    indexed = parse_json(row.tobytes(), _INDEXED_SHARD)
    cells = (indexed.count, extensions.size)
    expected = [("S", cells[:1]), ("S", cells[1:]), ("i", cells), ("i", cells), ("u", cells)]
    expected += [("S", (column_names.size,)), ("f", (column_names.size, indexed.count)), ("u", (row.size,))]
    for name, array, (kind, shape) in zip(names, arrays, expected, strict=True):
        if array.dtype.kind != kind or array.shape != shape:
            raise ValueError(f"'{name}' has another type or shape")
    are_absent = (offsets == ABSENT) & (sizes == ABSENT)
    # No sum, which can overflow.
    are_inside = (offsets >= BLOCK) & (sizes >= 0) & (sizes <= indexed.size - offsets)
    if not (are_absent | are_inside).all():
        raise ValueError("a member lies outside of its tar")
    values = dict(zip(map(decoded, column_names.tolist()), columns, strict=True))
    captions = np.nan_to_num(values.get("captions", np.ones(indexed.count)), nan=1.0)
    if not (captions >= 0).all() or captions.sum() != indexed.captions:
        raise ValueError("the numbers of captions are wrong")
    table = ShardTable(keys, tuple(map(decoded, extensions.tolist())), offsets, sizes, checksums, values)
    return table, indexed


def _text_array(texts: Sequence[str]) -> Shaped[NDArray[np.bytes_], " count"]:
    # surrogateescape: member names of a third-party tar may have any encoding.
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], dtype=np.bytes_)
