"""What a folder of shards holds: a small table of the set, and a table per shard.

A set is a folder of WebDataset tars. ``index.json`` lists the shards with their counts, sizes and digests and
holds what the set's maker wants remembered (``meta``); it is marked complete only when everything else is
there. Beside each ``NAME.tar`` lies ``NAME.npz``: where each member of each sample begins and how long it is,
so that any sample is one ranged read away.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int64, Shaped
from numpy.typing import NDArray
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from vqd_scale.core.errors import UserError
from vqd_scale.core.store import publish_json, published, read_json, sha256_of

INDEX = "index.json"
ABSENT = -1


@dataclass(frozen=True)
class Shard:
    """One tar of a set: its file, how many samples it holds, its bytes and their SHA-256."""

    path: Path
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
    """

    keys: Shaped[NDArray[np.bytes_], " count"]
    extensions: tuple[str, ...]
    offsets: Int64[NDArray[np.int64], "count extensions"]
    sizes: Int64[NDArray[np.int64], "count extensions"]


@dataclass(frozen=True)
class ShardSet:
    """A complete folder of shards, in the order of their names."""

    folder: Path
    shards: tuple[Shard, ...]
    meta: Mapping[str, Any]

    @property
    def count(self) -> int:
        """Samples in all shards together."""
        return sum(shard.count for shard in self.shards)

    @classmethod
    def open(cls, folder: Path) -> "ShardSet":
        """Read a set's index and see that its shards are there, whole.

        Raises:
            UserError: There is no set, it is half-made or empty, or a shard is missing or has another size.
        """
        index = _read_index(folder)
        if index is None:
            raise UserError(f"{folder}: no set of shards is here; make_shards.py makes or indexes one.")
        if not index["complete"]:
            raise UserError(
                f"{folder}: this set of shards is half-made; run the command that makes it again."
            )
        shards = tuple(
            Shard(folder / entry["name"], entry["count"], entry["size"], entry["sha256"])
            for entry in index["shards"]
        )
        for shard in shards:
            if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
                raise UserError(f"{shard.path}: missing or changed since it was indexed; make the set again.")
        opened = cls(folder, shards, index["meta"])
        if opened.count == 0:
            raise UserError(f"{folder}: this set of shards holds no sample.")
        return opened


def begin_set(folder: Path, meta: Mapping[str, Any]) -> None:
    """Say in the folder what is being made there, before its first shard.

    Raises:
        UserError: The folder already holds a set with another ``meta``, or cannot be written.
    """
    index = _read_index(folder)
    if index is None:
        publish_json(folder / INDEX, {"complete": False, "meta": meta, "shards": []})
    elif difference := _difference(index["meta"], json.loads(json.dumps(meta))):
        raise UserError(
            f"{folder}: holds another set of shards ({difference}); name another folder or delete it."
        )


def finish_set(folder: Path, meta: Mapping[str, Any], shards: Sequence[Shard]) -> ShardSet:
    """Publish the index of a set whose shards are all written.

    Raises:
        UserError: The folder cannot be written, or the set is empty.
    """
    entries = [
        {"name": shard.path.name, "count": shard.count, "size": shard.size, "sha256": shard.sha256}
        for shard in shards
    ]
    publish_json(folder / INDEX, {"complete": True, "meta": meta, "shards": entries})
    return ShardSet.open(folder)


def build_index(folder: Path) -> ShardSet:
    """Index a folder of tars that others wrote; shards indexed before are not read again.

    Raises:
        UserError: There is no tar, or one is damaged.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: there is no .tar file here.")
    index = _read_index(folder)
    meta = {} if index is None else index["meta"]
    bar = tqdm(paths, desc="indexing", unit="shard", disable=None)
    return finish_set(folder, meta, [indexed(path) or index_shard(path) for path in bar])


def index_shard(path: Path) -> Shard:
    """Read a tar once and publish its table beside it.

    Raises:
        UserError: The tar is damaged, or the table cannot be written.
    """
    samples = list(_samples(path))
    extensions = sorted({extension for _, members in samples for extension in members})
    places = np.full((len(samples), len(extensions), 2), ABSENT, dtype=np.int64)
    for row, (_, members) in enumerate(samples):
        for extension, place in members.items():
            places[row, extensions.index(extension)] = place
    shard = Shard(path, len(samples), path.stat().st_size, sha256_of(path))
    # Not through a path: numpy would append its own suffix to the unpublished name.
    with published(_table_path(path)) as partial, partial.open("wb") as file:
        np.savez(
            file,
            keys=_text_array([key for key, _ in samples]),
            extensions=_text_array(extensions),
            offsets=places[..., 0],
            sizes=places[..., 1],
            shard_size=np.int64(shard.size),
            shard_sha256=np.array(shard.sha256),
        )
    return shard


def indexed(path: Path) -> Shard | None:
    """The shard that was finished under this name before, if its table is there and its bytes are as then."""
    if not path.is_file() or not _table_path(path).is_file():
        return None
    arrays = _read_table(path)
    shard = Shard(path, len(arrays["keys"]), int(arrays["shard_size"]), str(arrays["shard_sha256"]))
    same = path.stat().st_size == shard.size and sha256_of(path) == shard.sha256
    return shard if same else None


def read_table(shard: Shard) -> ShardTable:
    """Read the table that lies beside a shard.

    Raises:
        UserError: The table is missing, damaged, or another shard's.
    """
    arrays = _read_table(shard.path)
    if str(arrays["shard_sha256"]) != shard.sha256 or len(arrays["keys"]) != shard.count:
        raise UserError(f"{_table_path(shard.path)}: not the table of this set's shard; make the set again.")
    return ShardTable(
        keys=arrays["keys"],
        extensions=tuple(decoded(extension) for extension in arrays["extensions"].tolist()),
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
    )


def decoded(name: bytes) -> str:
    """A name as a table holds it; what is not UTF-8 in it survives the way back."""
    return name.decode("utf-8", "surrogateescape")


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Group a tar's members as webdataset does: neighbours whose names agree up to the first dot."""
    key, members = "", dict[str, tuple[int, int]]()
    for name, place in _members(path):
        member_key, extension = base_plus_ext(name)
        if member_key is None or extension is None:
            continue
        if member_key != key and members:
            yield key, members
            members = {}
        key, extension = member_key, extension.lower()
        if extension in members:
            raise UserError(
                f"{path}: the sample '{key}' has two members '{extension}'; rename or remove one."
            )
        members[extension] = place
    if members:
        yield key, members


def _members(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each file's name and (offset, size) in a tar."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # tarfile takes a cut tar for a short one, and this project must never lose samples silently.
                if member.offset_data + member.size > size:
                    raise UserError(f"{path}: the tar ends within '{member.name}'; fetch or write it again.")
                if member.isfile():
                    yield member.name, (member.offset_data, member.size)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar ({error}); fetch or write it again.") from None
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{path}: the tar is cut or damaged at byte {end}; fetch or write it again.")


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    index = read_json(path, "index of a set of shards")
    if not isinstance(index, dict) or not {"complete", "meta", "shards"} <= set(
        cast("dict[str, Any]", index)
    ):
        raise UserError(f"{path}: not the index of a set of shards; name another folder.")
    return cast("dict[str, Any]", index)


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


def _table_path(path: Path) -> Path:
    return path.with_suffix(".npz")


def _read_table(path: Path) -> dict[str, NDArray[Any]]:
    table = _table_path(path)
    try:
        with np.load(table, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{table}: this shard's table cannot be read ({error}); delete it and make it again."
        ) from None


def _text_array(texts: Sequence[str]) -> Shaped[NDArray[np.bytes_], " count"]:
    # surrogateescape: a foreign tar may name its members in any encoding.
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], dtype=np.bytes_)
