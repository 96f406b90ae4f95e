"""Parallel writing of a dataset's shards by several processes, on one or many machines.

Worker i of n writes shards i, i + n, i + 2n, …. There are no locks and no waiting. A worker that has finished
its shards publishes its part of the index (``worker-<i>-of-<n>.json``). A worker that finds the parts of all
workers merges them, so that the dataset's index can be published. If two workers merge at the same time, they
publish the same bytes. A killed worker is restarted and writes its remaining shards.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int64
from pydantic import TypeAdapter

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, file_sizes, publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.safe_json import parse_json
from vqd_scale.data.shards.index_builder import check_share, left_out_of
from vqd_scale.data.shards.quarantine import QUARANTINE, publish_report
from vqd_scale.data.shards.shard_index import IndexedShard, Shard
from vqd_scale.data.shards.shard_io import ShardRecipe, written_or_write


@dataclass(frozen=True)
class _Part:
    shards: tuple[IndexedShard, ...]
    totals: tuple[int, ...]


_PART_SHAPE = TypeAdapter(_Part)
_PART = re.compile(r"worker-\d+-of-\d+\.json")

Item = TypeVar("Item")
Totals = Int64[NDArray[np.int64], " numbers"]


@dataclass(frozen=True)
class Worker:
    """One of several parallel workers.

    Attributes:
        number: Number of this worker, from 0.
        workers: Number of workers.

    Raises:
        UserError: ``number`` is not between 0 and ``workers - 1``.
    """

    number: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.workers:
            raise UserError(
                f"worker {self.number} of {self.workers}: workers are numbered from 0 to {self.workers - 1}."
            )

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this worker's items: ``number``, ``number + workers``, …."""
        return items[self.number :: self.workers]


@dataclass(frozen=True)
class WorkerIndex:
    """Index entries of some shards of a dataset.

    Attributes:
        shards: Index entries, in shard order.
        totals: Sums of the numbers that were counted in the shards.
    """

    shards: tuple[IndexedShard, ...]
    totals: Totals


def write_own_shards(
    folder: Location,
    recipes: Sequence[ShardRecipe],
    worker: Worker,
    count: Callable[[Shard], Totals],
    title: str,
    *,
    max_bad_fraction: float,
) -> WorkerIndex | None:
    """Write a worker's shards of a dataset after `begin_set`; finished shards are kept.

    Args:
        folder: Folder of the dataset.
        recipes: Recipes of all shards of the dataset, in order.
        worker: Worker whose shards are written.
        count: Function that counts numbers in a finished shard; also called for shards of an earlier run.
        title: Title of the progress bar.
        max_bad_fraction: Largest fraction of bad samples in the dataset.

    Returns:
        The index entries of all shards if all workers are done, else None.

    Raises:
        UserError: The folder cannot be written, or too many samples are bad; they are reported.
    """
    total = sum(recipe.count for recipe in recipes)
    own_recipes = worker.of(recipes)
    shards: list[IndexedShard] = []
    totals: Totals = np.zeros(1, np.int64)
    with progress_bar(title, sum(recipe.count for recipe in own_recipes), unit="sample") as bar:
        for recipe in own_recipes:
            shard = written_or_write(folder, recipe)
            shards.append(shard)
            _check(shards, total, max_bad_fraction, folder)
            totals = totals + count(shard.shard(folder, folder))
            bar.update(recipe.count)
    part = {"shards": [asdict(shard) for shard in shards], "totals": totals.tolist()}
    publish_json(_path(folder, worker), part)
    merged = _merged(folder, worker.workers)
    if merged is not None:
        _check(merged.shards, total, max_bad_fraction, folder)
        publish_report(folder / QUARANTINE, left_out_of(merged.shards, is_bad=True))
    return merged


def forget_parts(folder: Location) -> None:
    """Delete the workers' parts, for any number of workers, after the dataset's index is published.

    Raises:
        UserError: The store cannot be reached or denies access.
    """
    for name in file_sizes(folder):
        if _PART.fullmatch(name):
            with suppress(FileNotFoundError):
                (folder / name).unlink()


def _merged(folder: Location, workers: int) -> WorkerIndex | None:
    """Merge the parts of all workers; None if some are missing, or another worker has just merged them."""
    parts: list[WorkerIndex] = []
    for number in range(workers):
        path = _path(folder, Worker(number, workers))
        try:
            part = parse_json(path.read_bytes(), _PART_SHAPE)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); start worker {number} again.") from None
        parts.append(WorkerIndex(part.shards, np.array(part.totals, np.int64)))
    count = sum(len(part.shards) for part in parts)
    merged = tuple(parts[number % workers].shards[number // workers] for number in range(count))
    return WorkerIndex(merged, sum((part.totals for part in parts), np.zeros(1, np.int64)))


def _check(shards: Sequence[IndexedShard], total: int, max_bad_fraction: float, folder: Location) -> None:
    try:
        check_share(shards, total, max_bad_fraction, folder)
    except UserError:
        publish_report(folder / QUARANTINE, left_out_of(shards, is_bad=True))
        raise


def _path(folder: Location, worker: Worker) -> Location:
    return folder / f"worker-{worker.number}-of-{worker.workers}.json"
