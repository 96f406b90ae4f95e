"""Shards are written with webdataset's writer and published whole; they are read at indexed offsets."""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset.writer import ShardWriter

from vqd_scale.core.errors import UserError
from vqd_scale.core.store import published
from vqd_scale.data.decode import BadSample
from vqd_scale.data.index import (
    ABSENT,
    Shard,
    ShardSet,
    begin_set,
    decoded,
    finish_set,
    index_shard,
    indexed,
    read_table,
)

KEY = "__key__"
Sample = Mapping[str, Any]
"""webdataset's convention: the key under `KEY`; a member per extension, bytes or what webdataset encodes."""


@dataclass(frozen=True)
class ShardRecipe:
    """How one shard of a set is made.

    Attributes:
        name: The tar's file name, such as ``000012.tar``.
        count: How many samples are expected; some may turn out unusable.
        samples: Makes the samples, the same ones at each call.
    """

    name: str
    count: int
    samples: Callable[[], Iterable[Sample]]


def shard_name(number: int) -> str:
    """File name of a set's shard; names sort like numbers."""
    return f"{number:06d}.tar"


def write_shard_set(
    folder: Path, meta: Mapping[str, Any], recipes: Sequence[ShardRecipe], title: str
) -> ShardSet:
    """Write a set of shards; run again after a kill, it goes on with the first unfinished shard.

    Args:
        folder: Where the set is to be.
        meta: What the set is, as JSON holds it; a folder made with another ``meta`` is refused.
        recipes: The shards, in order.
        title: What the progress bar says.

    Raises:
        UserError: The folder holds another set, or cannot be written.
    """
    begin_set(folder, meta)
    shards: list[Shard] = []
    with tqdm(total=sum(recipe.count for recipe in recipes), desc=title, unit="sample", disable=None) as bar:
        for recipe in recipes:
            path = folder / recipe.name
            shards.append(indexed(path) or write_shard(path, recipe.samples()))
            bar.update(recipe.count)
    return finish_set(folder, meta, shards)


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write one tar and its table; the same samples give the same bytes.

    Raises:
        UserError: The folder cannot be written.
    """
    # The pattern is never used: the opener gives the one file, whatever characters its path has.
    with (
        published(path) as partial,
        partial.open("wb") as file,
        ShardWriter(
            "%d",
            maxcount=sys.maxsize,
            maxsize=float("inf"),
            verbose=0,
            opener=lambda _: file,
            mtime=0,
            user="",
            group="",
        ) as writer,
    ):
        for sample in samples:
            writer.write(dict(sample))
    return index_shard(path)


class ShardReader:
    """Random access to the samples of one shard.

    Raises:
        UserError: The shard or its table is missing or damaged.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._table = read_table(shard)
        self._columns = {extension: column for column, extension in enumerate(self._table.extensions)}
        try:
            self._descriptor = os.open(shard.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{shard.path}: this shard cannot be read ({error.strerror}).") from None
        weakref.finalize(self, os.close, self._descriptor)

    def key(self, member: int) -> str:
        """The key of a sample."""
        return decoded(self._table.keys[member])

    def extensions(self, member: int) -> list[str]:
        """The members that a sample has."""
        return [name for name, column in self._columns.items() if self._table.sizes[member, column] != ABSENT]

    def read(self, member: int, extension: str) -> bytes:
        """The content of one member of a sample.

        Raises:
            BadSample: The sample has no such member.
            UserError: The shard is shorter than it was.
        """
        column = self._columns.get(extension)
        size = ABSENT if column is None else int(self._table.sizes[member, column])
        if column is None or size == ABSENT:
            raise BadSample(f"has no '{extension}'")
        content = os.pread(self._descriptor, size, int(self._table.offsets[member, column]))
        if len(content) != size:
            raise UserError(f"{self.shard.path}: shorter than its table says; make or fetch it again.")
        return content


def read_shard(shard: Shard) -> Iterator[dict[str, Any]]:
    """All samples of a shard in order: the key under `KEY`, each member's bytes under its extension.

    Raises:
        UserError: The shard or its table is missing or damaged.
    """
    reader = ShardReader(shard)
    for member in range(shard.count):
        members = {extension: reader.read(member, extension) for extension in reader.extensions(member)}
        yield {KEY: reader.key(member), **members}
