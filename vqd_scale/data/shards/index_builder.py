"""Index builder for tars: one pass per tar, parallel, and resumable after a kill.

Third-party tars are never modified. Unusable and filtered samples are omitted from the tables, so that the
sample counts behind the sample order are exact.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from pydantic import TypeAdapter

from vqd_scale.core.atomic_io import Location, read_json, reading, sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.core.s3 import S3Object, S3Path
from vqd_scale.data.parquet_table import ParquetTable
from vqd_scale.data.process_pool import map_in_processes
from vqd_scale.data.shards.decode import (
    IMAGE_EXTENSIONS,
    BadSample,
    decode_image,
    decode_json,
    decode_text,
    image_extension,
    listed_captions,
    no_member,
)
from vqd_scale.data.shards.filters import Filters
from vqd_scale.data.shards.manifest import Count, read_index
from vqd_scale.data.shards.perceptual_hash import ExcludedImages
from vqd_scale.data.shards.quarantine import DUPLICATES, QUARANTINE, Quarantine
from vqd_scale.data.shards.shard_index import (
    IndexedShard,
    ShardSet,
    SkippedSample,
    begin_set,
    finish_set,
    table_name,
)
from vqd_scale.data.shards.shard_table import publish_table, read_indexed, table_of
from vqd_scale.data.shards.tar_list import list_tars
from vqd_scale.data.shards.tar_scanner import Position, TarSample, TarScan

MAX_CAPTIONS = 1_000_000
"""Maximum number of captions of a sample."""
MAX_CELLS = 1 << 26
"""Maximum number of a table's entries, samples times extensions."""
MAX_CLASS = 1 << 31
"""Bound of the class numbers."""

Rows = Mapping[str, Mapping[str, Any]]
"""Metadata of samples by key."""


@dataclass(frozen=True)
class SampleFilter:
    """Filter for the samples of a tar's table.

    Attributes:
        filters: Filters by metadata and caption.
        excluded_images: Hashes of excluded images; None skips the detection, which decodes every image.
    """

    filters: Filters = field(default_factory=Filters)
    excluded_images: ExcludedImages | None = None

    @property
    def content_extensions(self) -> frozenset[str]:
        """Extensions of the members whose contents are read."""
        images = IMAGE_EXTENSIONS if self.excluded_images is not None else ()
        captions = ("txt",) if self.filters.read_caption else ()
        return frozenset({"json", *images, *captions})

    def check(self, sample: TarSample, rows: Callable[[], Rows]) -> str:
        """Return the near-duplicate reason of a sample; empty if the sample is accepted.

        Args:
            sample: Sample to check.
            rows: Function that returns metadata by key, for samples without a ``json``.

        Raises:
            BadSample: Required metadata, caption or image cannot be read.
            Unwanted: The filters reject the sample.
            UserError: A filter names a column that the dataset lacks.
        """
        if self.filters.read_caption and "txt" not in sample.contents:
            raise no_member("txt", sample.members)
        caption = decode_text(sample.contents["txt"]) if self.filters.read_caption else ""
        metadata = _metadata(sample, rows) if self.filters.read_metadata else {}
        if not self.filters.accept(metadata, caption):
            raise Unwanted
        if self.excluded_images is None:
            return ""
        return self.excluded_images.match(decode_image(sample.contents[image_extension(sample.contents)]))


@dataclass(frozen=True)
class _Statistics:
    """Entries of img2dataset's ``NAME_stats.json`` that are used."""

    successes: Count | None = None


_STATISTICS = TypeAdapter(_Statistics)


class Unwanted(Exception):
    """Rejection of a sample by the filters."""


def build_index(
    tars: Location,
    folder: Location | None = None,
    sample_filter: SampleFilter | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
    max_bad_fraction: float = 0.01,
    workers: int = 1,
) -> ShardSet:
    """Index a folder of third-party tars; tars that are already indexed are not read again.

    Args:
        tars: Folder of the tars, or some of its tars as in `list_tars`. Nothing in the folder is changed,
            except that the index may be written there.
        folder: Folder of the index; None writes it beside the tars.
        sample_filter: Filter for the samples of the tables; None accepts all usable samples.
        meta: Metadata stored in the index; None keeps the metadata of an existing index.
        max_bad_fraction: Largest fraction of bad samples, and of damaged tars.
        workers: Number of processes.

    Raises:
        UserError: There is no tar; too many tars are damaged or too many samples bad; a filter names a column
            that the dataset lacks; the folder contains another index or cannot be written.
    """
    tars, names = list_tars(tars)
    folder = tars if folder is None else folder
    if meta is None:
        index = read_index(folder)
        meta = {} if index is None else index.meta
    begin_set(folder, meta, tars, [*map(table_name, names), QUARANTINE, DUPLICATES])
    index_one = functools.partial(_indexed_or_index, tars, folder, sample_filter)
    indexed = map_in_processes(index_one, names, workers)
    shards = list(progress(indexed, "index", len(names), unit="shard"))
    report(shards, folder)
    total = sum(shard.count + shard.filtered + sum(s.count for s in shard.left_out) for shard in shards)
    check_share(shards, total, max_bad_fraction, folder)
    damaged = [shard.name for shard in shards if any(not sample.key for sample in shard.left_out)]
    if len(damaged) > max_bad_fraction * len(shards):
        raise UserError(
            f"{tars / damaged[0]}: damaged, as {len(damaged)} of {len(shards)} tars are, more than "
            f"max_bad_fraction={max_bad_fraction}; fetch them again; "
            f"{folder / QUARANTINE} says what is wrong with each."
        )
    return finish_set(folder, meta, shards, tars)


def report(shards: Sequence[IndexedShard], folder: Location) -> None:
    """Write reports of bad samples and near-duplicates to the dataset's folder; filtered ones are omitted.

    Raises:
        UserError: The folder cannot be written.
    """
    for name, is_bad in ((QUARANTINE, True), (DUPLICATES, False)):
        if lines := left_out_of(shards, is_bad=is_bad):
            Quarantine(folder / name).extend(lines)


def left_out_of(shards: Sequence[IndexedShard], *, is_bad: bool) -> list[tuple[str, str, str]]:
    """List skipped samples as (shard, key, reason): the bad ones, or the near-duplicates."""
    return [
        (shard.name, sample.key, sample.reason)
        for shard in shards
        for sample in shard.left_out
        if sample.is_bad == is_bad
    ]


def check_share(
    shards: Sequence[IndexedShard], total: int, max_bad_fraction: float, folder: Location
) -> None:
    """Raise a `UserError` if more than ``max_bad_fraction`` of ``total`` samples are bad."""
    bad_samples = [(shard.name, sample) for shard in shards for sample in shard.left_out if sample.is_bad]
    if sum(sample.count for _, sample in bad_samples) > max_bad_fraction * total:
        # Damage to a tar, if there is any, explains the samples beside it.
        name, sample = min(bad_samples, key=lambda bad_sample: bool(bad_sample[1].key))
        raise UserError(
            f"{folder}: more than max_bad_fraction={max_bad_fraction} of the {total} samples cannot be used; "
            f"'{sample.key or name}' for one {sample.reason}; {folder / QUARANTINE} lists them."
        )


def index_tar(
    tar: Location,
    table: Location,
    sample_filter: SampleFilter | None = None,
    *,
    left_out: Sequence[SkippedSample] = (),
    version: str = "",
) -> IndexedShard:
    """Read a tar once and publish its table.

    Args:
        tar: Path of the tar.
        table: Path of the table to write.
        sample_filter: Filter for the samples of the table; None accepts all usable samples.
        left_out: Samples that were skipped when the tar was written.
        version: See `IndexedShard`.

    Raises:
        UserError: A filter names a column that the dataset lacks; the table cannot be written.
    """
    sample_filter = SampleFilter() if sample_filter is None else sample_filter
    scan = TarScan(tar, sample_filter.content_extensions)
    entries: list[tuple[str, Mapping[str, Position], Mapping[str, float]]] = []
    skipped = list(left_out)
    filtered = 0
    rows = functools.cache(lambda: _parquet_rows(tar))
    for sample in scan.samples():
        try:
            if sample.fault:
                raise BadSample(sample.fault)
            columns = _columns(sample)
            duplicate = sample_filter.check(sample, rows)
        except BadSample as error:
            skipped.append(SkippedSample(sample.key, str(error)))
        except UserError as error:
            raise UserError(f"{tar}: sample '{sample.key}': {error}") from None
        except Unwanted:
            filtered += 1
        else:
            if duplicate:
                skipped.append(SkippedSample(sample.key, duplicate, is_bad=False))
            else:
                entries.append((sample.key, sample.members, columns))
    sample_count = len(entries) + filtered + len(skipped) - len(left_out)
    expected_count = _expected_count(tar, sample_count)
    lost = max(scan.lost, expected_count - sample_count)
    damage = scan.damage or f"lacks some of the {expected_count} samples in its _stats.json"
    if lost:
        reason = f"{damage}; {sample_count} samples were found, up to {lost} are lost"
        skipped.append(SkippedSample("", reason, count=lost))
    extensions = {extension for _, members, _ in entries for extension in members}
    if len(entries) * len(extensions) > MAX_CELLS:
        raise UserError(
            f"{tar}: has {len(extensions)} different extensions of members; pack it so that members of one "
            "kind have one extension, as '0001.jpg' and '0001.txt'."
        )
    content = table_of(entries)
    captions = int(np.nan_to_num(content.columns.get("captions", np.ones(len(entries))), nan=1.0).sum())
    indexed = IndexedShard(
        tar.name, len(entries), scan.size, scan.sha256, captions, filtered, tuple(skipped), version
    )
    return publish_table(table, content, indexed)


def _indexed_or_index(
    tars: Location, folder: Location, sample_filter: SampleFilter | None, name: str
) -> IndexedShard:
    """Return a tar's index; the tar is read only if it is not indexed or was replaced since."""
    tar, table = tars / name, folder / table_name(name)
    if isinstance(tar, S3Path):
        content = S3Object(tar)
        version = f"{content.size} {content.etag}"
    else:
        with reading(tar):
            status = tar.stat()
        # No program can set the ctime, so that a replacement with size and mtime of the old tar is seen.
        version = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    if table.is_file():
        indexed = read_indexed(name, table)
        # A tar written by this package has no version: its table was written with it.
        if indexed.version == version or (not indexed.version and sha256_of(tar) == indexed.sha256):
            return indexed
    return index_tar(tar, table, sample_filter, version=version)


def _columns(sample: TarSample) -> dict[str, float]:
    """Return the number of captions and the class, as far as the sample's ``json`` has them.

    Raises:
        BadSample: The ``json`` is invalid, its captions are not text, or its class is too large.
    """
    value = decode_json(sample.contents.get("json", b"{}"))
    content = cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}
    columns: dict[str, float] = {}
    if content.get("captions") is not None:
        # A sample whose captions are all empty is one item, which is reported when it is read.
        columns["captions"] = max(1, len(listed_captions(content)))
        if columns["captions"] > MAX_CAPTIONS:
            raise BadSample(f"lists more than {MAX_CAPTIONS:,} captions")
    label = content.get("class")
    if isinstance(label, int | float) and not isinstance(label, bool):
        # Also true for nan.
        if not abs(label) < MAX_CLASS:
            raise BadSample(f"has a 'class' of {MAX_CLASS:,} or more")
        columns["class"] = float(label)
    return columns


def _metadata(sample: TarSample, rows: Callable[[], Rows]) -> Mapping[str, Any]:
    if "json" in sample.contents:
        value = decode_json(sample.contents["json"])
        if not isinstance(value, dict):
            raise BadSample("has a 'json' that names nothing")
        return cast("Mapping[str, Any]", value)
    # webdataset's keys include the folder, if there is one; img2dataset's do not.
    key = sample.key.rpartition("/")[2]
    if key not in rows():
        raise BadSample("has no 'json' and no line in its tar's parquet file")
    return rows()[key]


def _parquet_rows(tar: Location) -> Rows:
    """Read the rows of the parquet file that img2dataset writes beside a tar, by key."""
    path = tar.with_suffix(".parquet")
    if not path.exists():
        raise UserError(
            f"{tar}: filters need metadata, but its samples have no 'json' and {path} is missing."
        )
    return {str(line.get("key")): line for line in ParquetTable(path)}


def _expected_count(tar: Location, sample_count: int) -> int:
    """Return the number of samples in img2dataset's statistics of a tar; ``sample_count`` if it has none."""
    path = tar.with_name(tar.name.removesuffix(".tar") + "_stats.json")
    with reading(path):
        if not path.exists():
            return sample_count
    return read_json(path, "statistics file of a shard", _STATISTICS).successes or sample_count
