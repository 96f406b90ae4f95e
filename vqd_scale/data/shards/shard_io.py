"""Shard I/O: atomic writing with webdataset's writer, and random access at indexed offsets."""

import functools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, published, sha256_of
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.signals import report_progress
from vqd_scale.data.process_pool import map_in_processes
from vqd_scale.data.shards.decode import no_member
from vqd_scale.data.shards.index_builder import check_share, index_tar, report
from vqd_scale.data.shards.ranged_reader import Extents, RangedReader
from vqd_scale.data.shards.shard_index import (
    IndexedShard,
    Shard,
    ShardSet,
    SkippedSample,
    begin_set,
    changed,
    finish_set,
    table_name,
)
from vqd_scale.data.shards.shard_table import ABSENT, decoded, read_indexed, read_table
from vqd_scale.data.shards.tar_header import BLOCK

Item = TypeVar("Item")

KEY = "__key__"
Sample = Mapping[str, Any]
"""Sample in webdataset format: key under `KEY`, and one member per extension (bytes or encodable value)."""


@dataclass(frozen=True)
class ShardRecipe:
    """Recipe of one shard.

    Attributes:
        name: File name of the tar, such as ``000012.tar``.
        count: Expected number of samples, including skipped ones.
        samples: Deterministic function that yields samples and skipped samples; picklable if several
            processes write.
    """

    name: str
    count: int
    samples: Callable[[], Iterable[Sample | SkippedSample]]


def shard_name(number: int) -> str:
    """Return the file name of a shard; names sort like numbers."""
    return f"{number:06d}.tar"


def shard_recipes(
    items: Sequence[Item],
    samples_per_shard: int,
    samples: Callable[[Sequence[Item]], Iterable[Sample | SkippedSample]],
) -> list[ShardRecipe]:
    """Cut a dataset's items into shards.

    Args:
        items: One item per sample, in order; a range is cut without being stored.
        samples_per_shard: Number of samples in a shard; the last shard contains the remainder.
        samples: Function that yields the samples of some items, as in `ShardRecipe`.
    """
    parts = [items[first : first + samples_per_shard] for first in range(0, len(items), samples_per_shard)]
    return [
        ShardRecipe(shard_name(number), len(part), functools.partial(samples, part))
        for number, part in enumerate(parts)
    ]


def write_shard_set(
    folder: Location,
    meta: Mapping[str, Any],
    recipes: Sequence[ShardRecipe],
    title: str,
    *,
    workers: int = 1,
    max_bad_fraction: float = 0.0,
) -> ShardSet:
    """Write a sharded dataset; after a kill, a rerun resumes at the first unfinished shard.

    Args:
        folder: Folder of the dataset.
        meta: Description of the dataset (JSON); a folder with another ``meta`` is an error.
        recipes: Recipes of the shards, in order.
        title: Title of the progress bar.
        workers: Number of writing processes.
        max_bad_fraction: Largest fraction of bad samples, which are skipped and reported.

    Raises:
        UserError: The folder contains another dataset or cannot be written; too many samples are bad.
    """
    begin_set(folder, meta)
    shards: list[IndexedShard] = []
    total = sum(recipe.count for recipe in recipes)
    indexed = map_in_processes(functools.partial(written_or_write, folder), recipes, workers)
    with progress_bar(title, total, unit="sample") as bar:
        for recipe, shard in zip(recipes, indexed, strict=True):
            shards.append(shard)
            report(shards[-1:], folder)
            check_share(shards, total, max_bad_fraction, folder)
            bar.update(recipe.count)
    return finish_set(folder, meta, shards)


def write_shard(path: Location, samples: Iterable[Sample | SkippedSample]) -> IndexedShard:
    """Write one tar and its table, byte-for-byte reproducible; errors as for `published`."""
    # Imported here: webdataset imports torch.
    from webdataset.writer import ShardWriter

    left_out: list[SkippedSample] = []
    # The pattern is unused: the opener returns the one open file, whose path may contain any character.
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
            if isinstance(sample, SkippedSample):
                left_out.append(sample)
            else:
                writer.write(dict(sample))
    return index_tar(path, path.with_name(table_name(path.name)), left_out=left_out)


def written_or_write(folder: Location, recipe: ShardRecipe) -> IndexedShard:
    """Return a finished shard if its table exists and its digest matches; otherwise write the shard.

    Raises:
        UserError: The folder cannot be written.
    """
    path, table = folder / recipe.name, folder / table_name(recipe.name)
    if path.is_file() and table.is_file():
        indexed = read_indexed(recipe.name, table)
        if sha256_of(path) == indexed.sha256:
            return indexed
    indexed = write_shard(path, recipe.samples())
    report_progress()
    return indexed


class ShardReader:
    """Random access to the samples of one shard.

    Args:
        shard: Shard to read.
        reading: Shard access of this process; None assumes sequential reads.

    Raises:
        UserError: The shard or its table is missing or damaged.
    """

    def __init__(self, shard: Shard, reading: RangedReader | None = None) -> None:
        self.shard = shard
        self._table = read_table(shard)
        self._columns = {extension: column for column, extension in enumerate(self._table.extensions)}
        self._spans: dict[tuple[str, ...], Int64[NDArray[np.int64], "count places"]] = {}
        self._bytes = (reading or RangedReader.in_order(shard)).open(shard, self._extents)

    def key(self, member: int) -> str:
        """Return the key of a sample."""
        return decoded(self._table.keys[member])

    def captions(self, member: int) -> int:
        """Return the number of captions of a sample, from the table."""
        return self._caption_ends.item(member) - self._captions_before(member)

    def captioned(self, caption: int) -> tuple[int, int]:
        """Convert a caption index in the shard to (sample index, caption index in the sample)."""
        member = int(np.searchsorted(self._caption_ends, caption, side="right"))
        return member, caption - self._captions_before(member)

    def extensions(self, member: int) -> list[str]:
        """List the member extensions of a sample."""
        return [name for name, column in self._columns.items() if self._table.sizes[member, column] != ABSENT]

    def expect(self, member: int) -> None:
        """Prefetch a sample that will be read soon; a request to S3 is started without waiting."""
        self._bytes.expect(member)

    def read(self, member: int, extension: str) -> bytes:
        """Read the content of one member of a sample.

        Raises:
            BadSample: The sample has no such member.
            UserError: The shard is missing or changed; its store cannot be reached.
        """
        return self.read_together(member, (extension,))[0]

    def read_together(self, member: int, extensions: tuple[str, ...]) -> list[bytes]:
        """Read small members of a sample with one read; they are neighbors in the tar.

        Raises:
            BadSample: The sample lacks one of the members.
            UserError: The shard is missing or changed; its store cannot be reached.
        """
        begin, end, *within = self._spans_of(extensions)[member].tolist()
        if begin == ABSENT:
            members = self.extensions(member)
            raise no_member(next(name for name in extensions if name not in members), members)
        content = self._bytes.read(member, begin, end)
        view, contents = memoryview(content), list[bytes]()
        for first, last, checksum in zip(within[::3], within[1::3], within[2::3], strict=True):
            if checksum and zlib.crc32(view[first - BLOCK : last]) != checksum:
                raise changed(self.shard.path, f"'{self.key(member)}' is another")
            contents.append(content[first:last])
        return contents

    def _spans_of(self, extensions: tuple[str, ...]) -> Int64[NDArray[np.int64], "count places"]:
        """Return, per sample, the byte range of the members, and each one's range within it and checksum.

        The range includes the header blocks, which the checksums cover. A row is `ABSENT` if the sample lacks
        a member. Computed for all samples at once, since indexing single array elements takes longer than
        reading.
        """
        if extensions not in self._spans:
            columns = [self._columns.get(extension, ABSENT) for extension in extensions]
            begins, sizes = self._table.offsets[:, columns], self._table.sizes[:, columns]
            ends = begins + sizes
            firsts, lasts = begins.min(axis=1, keepdims=True) - BLOCK, ends.max(axis=1, keepdims=True)
            checksums = self._table.checksums[:, columns].astype(np.int64)
            within = np.stack([begins - firsts, ends - firsts, checksums], axis=2)
            within = within.reshape(self.shard.count, 3 * len(columns))
            spans = np.concatenate([firsts, lasts, within], axis=1)
            spans[(sizes == ABSENT).any(axis=1) | (ABSENT in columns)] = ABSENT
            self._spans[extensions] = spans
        return self._spans[extensions]

    @functools.cached_property
    def _caption_ends(self) -> Int64[NDArray[np.int64], " count"]:
        """Cumulative number of captions, up to and including each sample."""
        counted = self._table.columns.get("captions", np.full(self.shard.count, np.nan))
        return np.cumsum(np.nan_to_num(counted, nan=1.0).astype(np.int64))

    def _captions_before(self, member: int) -> int:
        return self._caption_ends.item(member - 1) if member else 0

    def _extents(self) -> Extents:
        """Return the byte range of each sample, without members that are links to earlier ones."""
        offsets, sizes = self._table.offsets, self._table.sizes
        ends = np.maximum.accumulate(np.where(offsets == ABSENT, 0, offsets + sizes).max(axis=1, initial=0))
        are_own = offsets >= np.concatenate([[0], ends[:-1]])[:, None]
        begins = np.where(are_own, offsets - BLOCK, self.shard.size).min(axis=1, initial=self.shard.size)
        return np.stack([begins, np.maximum(begins, ends)], axis=1)


def read_shard(shard: Shard) -> Iterator[dict[str, Any]]:
    """Yield all samples of a shard in order: key under `KEY`, each member's bytes under its extension.

    Raises:
        UserError: The shard or its table is missing or damaged, or its store cannot be reached.
    """
    reading = RangedReader.in_order(shard)
    reader, step = ShardReader(shard, reading), reading.samples
    for member in range(shard.count):
        if member % step == 0:
            for ahead in range(member, min(member + (1 + reading.turns) * step, shard.count), step):
                reader.expect(ahead)
        members = {extension: reader.read(member, extension) for extension in reader.extensions(member)}
        yield {KEY: reader.key(member), **members}
