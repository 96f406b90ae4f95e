"""Index builder for tars: one pass per tar, parallel, and resumable after a kill.

Third-party tars are never modified. Unusable and filtered samples are omitted from the tables, so that the
sample counts behind the sample order are exact.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from vqd_scale.core.atomic_io import Location, file_sizes, read_json, sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.core.s3 import S3Object, S3Path
from vqd_scale.data.process_pool import map_in_processes
from vqd_scale.data.shards.decode import (
    IMAGE_EXTENSIONS,
    BadSample,
    decode_image,
    decode_json,
    decode_text,
    image_extension,
)
from vqd_scale.data.shards.filters import Filters
from vqd_scale.data.shards.perceptual_hash import ExcludedImages
from vqd_scale.data.shards.quarantine import DUPLICATES, QUARANTINE, Quarantine
from vqd_scale.data.shards.shard_index import (
    IndexedShard,
    ShardSet,
    SkippedSample,
    begin_set,
    finish_set,
    publish_table,
    read_index,
    read_indexed,
    table_name,
    table_of,
)
from vqd_scale.data.shards.tar_scanner import TarSample, TarScan

COLUMNS = ("captions", "class")
"""Entries of a sample's ``json`` stored in the table: a number as its value, a list as its length."""

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
            raise BadSample("has no 'txt'")
        caption = decode_text(sample.contents["txt"]) if self.filters.read_caption else ""
        metadata = _metadata(sample, rows) if self.filters.read_metadata else {}
        if not self.filters.accept(metadata, caption):
            raise Unwanted
        if self.excluded_images is None:
            return ""
        return self.excluded_images.match(decode_image(sample.contents[image_extension(sample.contents)]))


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
        tars: Folder of the tars. Nothing in it is changed, except that the index may be written there.
        folder: Folder of the index; None writes it beside the tars.
        sample_filter: Filter for the samples of the tables; None accepts all usable samples.
        meta: Metadata stored in the index; None keeps the metadata of an existing index.
        max_bad_fraction: Largest fraction of bad samples, and of damaged tars.
        workers: Number of processes.

    Raises:
        UserError: There is no tar; too many tars are damaged or too many samples bad; a filter names a column
            that the dataset lacks; the folder contains another index or cannot be written.
    """
    folder = tars if folder is None else folder
    names = sorted(name for name in file_sizes(tars) if name.endswith(".tar"))
    if not names:
        raise UserError(f"{tars}: there is no .tar file here.")
    if meta is None:
        index = read_index(folder)
        meta = cast("Mapping[str, Any]", {} if index is None else index["meta"])
    begin_set(folder, meta, tars, [*map(table_name, names), QUARANTINE, DUPLICATES])
    index_one = functools.partial(_indexed_or_index, tars, folder, sample_filter)
    indexed = map_in_processes(index_one, names, workers)
    shards = list(progress(indexed, "index", len(names), unit="shard"))
    report(shards, folder)
    total = sum(shard.count + shard.filtered + len(shard.left_out) for shard in shards)
    check_share(shards, total, max_bad_fraction, folder)
    damaged = [shard.name for shard in shards if any(not sample.key for sample in shard.left_out)]
    if len(damaged) > max_bad_fraction * len(shards):
        raise UserError(
            f"{tars / damaged[0]}: damaged, as {len(damaged)} of {len(shards)} tars are, more than "
            f"max_bad_fraction={max_bad_fraction}; fetch them again or tolerate more; "
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
    if len(bad_samples) > max_bad_fraction * total:
        name, sample = bad_samples[0]
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
    entries: list[tuple[str, Mapping[str, tuple[int, int]], Mapping[str, float]]] = []
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
        except Unwanted:
            filtered += 1
        else:
            if duplicate:
                skipped.append(SkippedSample(sample.key, duplicate, is_bad=False))
            else:
                entries.append((sample.key, sample.members, columns))
    sample_count = len(entries) + filtered + len(skipped) - len(left_out)
    damage = scan.damage or _check_count(tar, sample_count)
    if damage:
        skipped.append(SkippedSample("", f"{damage}; {sample_count} samples were found"))
    content = table_of(entries)
    captions = int(np.nan_to_num(content.columns.get("captions", np.ones(len(entries))), nan=1.0).sum())
    indexed = IndexedShard(
        tar.name, len(entries), scan.size, scan.sha256, captions, filtered, tuple(skipped), version
    )
    publish_table(table, content, indexed)
    return indexed


def _indexed_or_index(
    tars: Location, folder: Location, sample_filter: SampleFilter | None, name: str
) -> IndexedShard:
    """Return a tar's index; the tar is read only if it is not indexed or was replaced since."""
    tar, table = tars / name, folder / table_name(name)
    if isinstance(tar, S3Path):
        version = f"{S3Object(tar).size}"
    else:
        status = tar.stat()
        version = f"{status.st_size} {status.st_mtime_ns}"
    if table.is_file():
        indexed = read_indexed(name, table)
        # A tar written by this package has no version: its table was written with it.
        if indexed.version == version or (not indexed.version and sha256_of(tar) == indexed.sha256):
            return indexed
    return index_tar(tar, table, sample_filter, version=version)


def _columns(sample: TarSample) -> dict[str, float]:
    value = decode_json(sample.contents.get("json", b"{}"))
    columns: dict[str, float] = {}
    for name in COLUMNS if isinstance(value, dict) else ():
        entry = value.get(name)
        if isinstance(entry, list):
            columns[name] = float(len(entry))
        elif isinstance(entry, int | float):
            columns[name] = float(entry)
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
    try:
        # Any: an optional package, untyped if it is not installed.
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading parquet files needs pyarrow; install it with pip install 'vqd-scale[parquet]'."
        ) from None
    try:
        lines = parquet.read_table(arrow.BufferReader(path.read_bytes())).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); fetch it again.") from None
    return {str(line.get("key")): line for line in lines}


def _check_count(tar: Location, sample_count: int) -> str:
    """Compare a tar's sample count with img2dataset's statistics; empty if equal or without statistics."""
    path = tar.with_name(tar.name.removesuffix(".tar") + "_stats.json")
    if not path.exists():
        return ""
    counted = read_json(path, "statistics of a shard").get("successes")
    return "" if counted in (None, sample_count) else f"lacks some of the {counted} samples in {path.name}"
