"""From tars to their index: one pass over each, several at a time, taken up again after a kill.

Tars of others are indexed as they are. What cannot be used or is not wanted is left out of the tables, so
that the counts that everything else is planned with are true.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from vqd_scale.core.atomic_io import Location, file_sizes, read_json, sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Object, S3Path
from vqd_scale.data.process_pool import each
from vqd_scale.data.shards.decode import IMAGE_EXTENSIONS, BadSample, decode_image, decode_json, decode_text
from vqd_scale.data.shards.filters import Filters
from vqd_scale.data.shards.perceptual_hash import KnownPictures
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
"""What a table keeps of a sample's ``json``: a number as it is, of a list how long it is."""


@dataclass(frozen=True)
class SampleFilter:
    """Which samples of a tar get into its table.

    Attributes:
        filters: What their metadata must say.
        known: Pictures that must not occur; looking for them means to decode every picture.
    """

    filters: Filters = field(default_factory=Filters)
    known: KnownPictures | None = None

    @property
    def wanted(self) -> frozenset[str]:
        """The members whose contents are needed."""
        pictures = IMAGE_EXTENSIONS if self.known is not None else ()
        captions = ("txt",) if self.filters.read_caption else ()
        return frozenset({"json", *pictures, *captions})

    def check(self, sample: TarSample, rows: Callable[[], Mapping[str, Mapping[str, Any]]]) -> str:
        """Whether a sample is wanted: empty, or how it resembles a picture that must not occur.

        Args:
            sample: The sample.
            rows: Gives metadata by key, for samples without a ``json``.

        Raises:
            BadSample: Its metadata, caption or picture, as far as needed, cannot be read.
            Unwanted: The filters do not accept it.
            UserError: A filter is about a column that the set does not have.
        """
        caption = decode_text(_content(sample, "txt")) if self.filters.read_caption else ""
        metadata = _metadata(sample, rows) if self.filters.read_metadata else {}
        if not self.filters.accept(metadata, caption):
            raise Unwanted
        if self.known is None:
            return ""
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample.contents), "picture")
        near = self.known.nearest(decode_image(_content(sample, extension)))
        return "" if near is None else f"is nearly the picture '{near[0]}' ({near[1]} of 64 bits differ)"


class Unwanted(Exception):
    """The filters do not accept a sample."""


@dataclass(frozen=True)
class IndexConfig:
    """How a folder of tars is indexed.

    Attributes:
        sieve: Which samples get into the tables.
        max_bad_fraction: Which share of the samples, and of the tars, may be bad.
        workers: Processes that index at the same time.
    """

    sieve: SampleFilter = field(default_factory=SampleFilter)
    max_bad_fraction: float = 0.01
    workers: int = 1


def build_index(
    tars: Location,
    folder: Location | None = None,
    config: IndexConfig | None = None,
    meta: Mapping[str, Any] | None = None,
) -> ShardSet:
    """Index a folder of tars that others wrote; shards indexed before are not read again.

    Args:
        tars: The folder of the tars; nothing in it is changed, but for an index that is to lie there.
        folder: Where the index is to be; beside the tars if not given.
        config: How.
        meta: What is remembered with the set; what was remembered before if not given.

    Raises:
        UserError: There is no tar; too many are damaged, or too many samples bad; a filter is about a column
            that the set does not have; the folder holds another index or cannot be written.
    """
    config = IndexConfig() if config is None else config
    folder = tars if folder is None else folder
    names = sorted(name for name in file_sizes(tars) if name.endswith(".tar"))
    if not names:
        raise UserError(f"{tars}: there is no .tar file here.")
    if meta is None:
        index = read_index(folder)
        meta = cast("Mapping[str, Any]", {} if index is None else index["meta"])
    begin_set(folder, meta, tars)
    made = each(functools.partial(_indexed_or_index, tars, folder, config.sieve), names, config.workers)
    bar = tqdm(made, desc="indexing", total=len(names), unit="shard", disable=None)
    shards = list(bar)
    report(shards, folder)
    check_share(shards, sum(map(_seen, shards)), config.max_bad_fraction, folder)
    damaged = [shard.name for shard in shards if any(not left.key for left in shard.left_out)]
    if len(damaged) > config.max_bad_fraction * len(shards):
        raise UserError(
            f"{tars / damaged[0]}: damaged, as {len(damaged)} of {len(shards)} tars are, more than "
            f"max_bad_fraction={config.max_bad_fraction}; fetch them again or tolerate more; "
            f"{folder / QUARANTINE} says what is wrong with each."
        )
    return finish_set(folder, meta, shards, tars)


def report(shards: Sequence[IndexedShard], folder: Location) -> None:
    """Write what was left out of shards, but for what filters did not accept, into the set's folder.

    Raises:
        UserError: The folder cannot be written.
    """
    for name, is_bad in ((QUARANTINE, True), (DUPLICATES, False)):
        if lines := left_out_of(shards, is_bad=is_bad):
            Quarantine(folder / name).extend(lines)


def left_out_of(shards: Sequence[IndexedShard], *, is_bad: bool) -> list[tuple[str, str, str]]:
    """What was left out of shards as (shard, key, reason), for being bad or for its likeness to others."""
    return [
        (shard.name, left.key, left.reason)
        for shard in shards
        for left in shard.left_out
        if left.is_bad == is_bad
    ]


def check_share(
    shards: Sequence[IndexedShard], total: int, max_bad_fraction: float, folder: Location
) -> None:
    """See that not too many of ``total`` samples are bad.

    Raises:
        UserError: They are.
    """
    bad = [(shard.name, left) for shard in shards for left in shard.left_out if left.is_bad]
    if len(bad) > max_bad_fraction * total:
        name, left = bad[0]
        raise UserError(
            f"{folder}: more than max_bad_fraction={max_bad_fraction} of the {total} samples cannot be used; "
            f"'{left.key or name}' for one {left.reason}; {folder / QUARANTINE} lists them."
        )


def index_tar(
    tar: Location,
    table: Location,
    sieve: SampleFilter | None = None,
    *,
    left_out: Sequence[SkippedSample] = (),
    version: str = "",
) -> IndexedShard:
    """Read a tar once and publish its table.

    Args:
        tar: The tar.
        table: Where its table is to be.
        sieve: Which samples get into it; all that can be used if not given.
        left_out: What was left out of the tar itself.
        version: See `IndexedShard`.

    Raises:
        UserError: A filter is about a column that the set does not have; the table cannot be written.
    """
    sieve = SampleFilter() if sieve is None else sieve
    scan = TarScan(tar, sieve.wanted)
    kept: list[tuple[str, Mapping[str, tuple[int, int]], Mapping[str, float]]] = []
    left = list(left_out)
    filtered = 0
    rows = functools.cache(lambda: _parquet_rows(tar))
    for sample in scan.samples():
        try:
            if sample.fault:
                raise BadSample(sample.fault)
            columns = _columns(sample)
            likeness = sieve.check(sample, rows)
        except BadSample as error:
            left.append(SkippedSample(sample.key, str(error)))
        except Unwanted:
            filtered += 1
        else:
            if likeness:
                left.append(SkippedSample(sample.key, likeness, is_bad=False))
            else:
                kept.append((sample.key, sample.places, columns))
    seen = len(kept) + filtered + len(left) - len(left_out)
    damage = scan.damage or _missing(tar, seen)
    if damage:
        left.append(SkippedSample("", f"{damage}; {seen} samples were found"))
    content = table_of(kept)
    captions = content.columns.get("captions")
    found = IndexedShard(
        tar.name,
        len(kept),
        scan.size,
        scan.sha256,
        len(kept) if captions is None else int(np.nan_to_num(captions, nan=1.0).sum()),
        filtered,
        tuple(left),
        version,
    )
    publish_table(table, content, found)
    return found


def _indexed_or_index(tars: Location, folder: Location, sieve: SampleFilter, name: str) -> IndexedShard:
    """A tar's index, read again only if it was not indexed or was replaced since."""
    tar, table = tars / name, folder / table_name(name)
    version = _version(tar)
    if table.is_file():
        found = read_indexed(name, table)
        # A tar of our own has no version: its table was written with it.
        if found.version == version or (not found.version and sha256_of(tar) == found.sha256):
            return found
    return index_tar(tar, table, sieve, version=version)


def _seen(shard: IndexedShard) -> int:
    return shard.count + shard.filtered + len(shard.left_out)


def _version(tar: Location) -> str:
    if isinstance(tar, S3Path):
        return f"{S3Object(tar).size}"
    status = tar.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _columns(sample: TarSample) -> dict[str, float]:
    if "json" not in sample.contents:
        return {}
    value = decode_json(sample.contents["json"])
    columns: dict[str, float] = {}
    for name in COLUMNS if isinstance(value, dict) else ():
        entry = value.get(name)
        if isinstance(entry, list):
            columns[name] = float(len(entry))
        elif isinstance(entry, int | float):
            columns[name] = float(entry)
    return columns


def _content(sample: TarSample, extension: str) -> bytes:
    if extension not in sample.contents:
        raise BadSample(f"has no '{extension}'")
    return sample.contents[extension]


def _metadata(sample: TarSample, rows: Callable[[], Mapping[str, Mapping[str, Any]]]) -> Mapping[str, Any]:
    if "json" in sample.contents:
        value = decode_json(sample.contents["json"])
        if not isinstance(value, dict):
            raise BadSample("has a 'json' that names nothing")
        return cast("Mapping[str, Any]", value)
    # webdataset's keys hold the folder, if there is one; img2dataset's do not.
    key = sample.key.rpartition("/")[2]
    if key not in rows():
        raise BadSample("has no 'json' and no line in its tar's parquet file")
    return rows()[key]


def _parquet_rows(tar: Location) -> Mapping[str, Mapping[str, Any]]:
    """The lines of the parquet file that img2dataset writes beside a tar, by key."""
    path = tar.with_suffix(".parquet")
    if not path.exists():
        raise UserError(
            f"{tar}: filters need metadata, but its samples have no 'json' and {path} is missing."
        )
    try:
        # Any: an optional package, without types where it is not installed.
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


def _missing(tar: Location, seen: int) -> str:
    """What a tar lacks of what img2dataset counted into it; empty if nothing, or if it did not count."""
    path = tar.with_name(tar.name.removesuffix(".tar") + "_stats.json")
    if not path.exists():
        return ""
    counted = read_json(path, "statistics of a shard").get("successes")
    return "" if counted in (None, seen) else f"lacks some of the {counted} samples in {path.name}"
