"""Start and resume of single reader processes in the order of a very large dataset."""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmarks.measuring import extra_peak, in_fresh_process

from vqd_scale.core.progress import progress
from vqd_scale.data.order.mixture import shares
from vqd_scale.data.order.plan import LaneOrder, Slots, owned_lanes
from vqd_scale.data.shards.shard_index import IndexedShard, ShardSet, begin_set, finish_set
from vqd_scale.data.shards.shard_io import ShardReader, shard_name
from vqd_scale.data.shards.shard_table import publish_table, table_of
from vqd_scale.data.shards.tar_scanner import Position

_LANES_WALKED = 64
"""Number of lanes that the check for completeness reads to their ends."""

_BYTES = 4096
"""Size of a shard's sparse file, of which only the table is read."""


@dataclass(frozen=True)
class PlanProblem:
    """Dataset and its readers; by default LAION-400M as written by img2dataset, on a thousand GPUs.

    Attributes:
        shards: Number of shards.
        samples: Samples per shard.
        ranks: Number of ranks.
        workers: Reader processes per rank, with one lane each.
        shuffle_window: Number of neighboring samples of a lane that are shuffled together.
    """

    shards: int = 41_408
    samples: int = 10_000
    ranks: int = 1_024
    workers: int = 8
    shuffle_window: int = 1_000

    @property
    def lanes(self) -> int:
        """Number of lanes, one per reader process."""
        return self.ranks * self.workers

    @property
    def total(self) -> int:
        """Samples of an epoch."""
        return self.shards * self.samples

    def order(self, shards: ShardSet | None = None) -> LaneOrder:
        """Return the order of the dataset, from given counts or from its index."""
        counts = [self.samples] * self.shards if shards is None else shards.counts
        (share,) = shares([1], self.lanes)
        return LaneOrder(counts, share, self.shuffle_window, seed=0)

    def first_slots(self, worker: int, place: float) -> Slots:
        """Return the slots of a reader process's first batch from a position in the epoch, 0 to 1."""
        rank, of_rank = divmod(worker, self.workers)
        lanes = np.array_split(np.asarray(owned_lanes(self.lanes, rank, self.ranks)), self.workers)[of_rank]
        return int(self.total * place) // self.lanes * self.lanes + lanes.astype(np.int64)

    def write(self, folder: Path, tables: Sequence[int]) -> None:
        """Write the dataset's index, and the tables of a few shards: all tables would be 40 GB."""
        names = [shard_name(number) for number in range(self.shards)]
        shards = [
            IndexedShard(name, self.samples, _BYTES, hashlib.sha256(name.encode()).hexdigest(), self.samples)
            for name in names
        ]
        begin_set(folder, {"content": "images"})
        for name in names:
            with (folder / name).open("wb") as file:
                file.truncate(_BYTES)
        extensions = ("jpg", "json", "txt")
        table = table_of(
            [
                (f"{number:09d}", dict.fromkeys(extensions, Position(512, 1024, 0)), {"captions": 1.0})
                for number in range(self.samples)
            ]
        )
        for number in tables:
            shards[number] = publish_table(folder / f"{number:06d}.npz", table, shards[number])
        finish_set(folder, {"content": "images"}, shards)


def benchmark_plan(rounds: int, problem: PlanProblem | None = None) -> dict[str, Any]:
    """Measure seconds and added megabytes until a reader process has located its first batch.

    Each time in a fresh process, from opening the index to the open shards of its first batch, tables
    included, at the beginning of an epoch and at nine tenths of it; the worst of several processes counts.
    That every sample comes exactly once is checked before: see `check_complete`.

    Args:
        rounds: How often each is measured; the median counts for seconds, the largest for megabytes.
        problem: The sizes.

    Raises:
        ValueError: A sample comes twice or never.
    """
    problem = PlanProblem() if problem is None else problem
    check_complete(problem, _LANES_WALKED)
    workers = (0, problem.lanes // 2 + 1, problem.lanes - 1)
    cases = {(worker, place): problem.first_slots(worker, place) for worker in workers for place in (0, 0.9)}
    order = problem.order()
    opened = {number for slots in cases.values() for number in order.locate(slots)[1].tolist()}
    figures: dict[tuple[int, float], list[tuple[float, int]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as temporary:
        folder = Path(temporary)
        problem.write(folder, sorted(opened))
        for _ in progress(range(rounds), "plans", rounds):
            for (worker, place), slots in cases.items():
                seconds = in_fresh_process(partial(_seconds, problem, folder, slots))
                added = in_fresh_process(partial(_added, problem, folder, slots))
                figures[worker, place].append((seconds, added))
    by_place = {
        place: max(
            median(seconds for seconds, _ in measurements)
            for (_, of), measurements in figures.items()
            if of == place
        )
        for place in (0, 0.9)
    }
    return {
        "seconds": round(by_place[0], 4),
        "seconds_at_nine_tenths": round(by_place[0.9], 4),
        "megabytes": round(
            max(added for measurements in figures.values() for _, added in measurements) / 1e6, 2
        ),
        "shape": [problem.shards, problem.samples, problem.ranks, problem.workers],
        "lanes_walked": min(_LANES_WALKED, problem.lanes),
        "all_seconds": [
            round(seconds, 4) for measurements in figures.values() for seconds, _ in measurements
        ],
    }


def check_complete(problem: PlanProblem, walked: int) -> None:
    """Check that an epoch contains every sample exactly once over all readers.

    The pieces of all lanes together are the epoch's line of samples, and the line is one order of the shards;
    so it is left to see that a lane goes through its own piece. ``walked`` lanes, evenly chosen, are asked
    for every one of their slots, and must give the samples of their pieces, each once.

    Raises:
        ValueError: A sample is missing or occurs twice.
    """
    order = problem.order()
    epoch = order.epoch(0)
    ends = epoch.lane_starts + epoch.lane_lengths
    if epoch.lane_starts[0] != 0 or ends[-1] != problem.total or (ends[:-1] != epoch.lane_starts[1:]).any():
        raise ValueError("the lanes' pieces do not make up the epoch")
    if not np.array_equal(np.sort(epoch.shards), np.arange(problem.shards)):
        raise ValueError("the line lacks a shard")
    line = np.empty(problem.shards, np.int64)
    line[epoch.shards] = epoch.starts
    walked = min(walked, problem.lanes)
    chosen = np.linspace(0, problem.lanes - 1, walked).astype(np.int64).tolist()
    for lane in progress(chosen, "lanes", walked):
        _, shards, members = order.locate(np.arange(lane, problem.total, problem.lanes))
        piece = np.arange(epoch.lane_starts.item(lane), ends.item(lane))
        if not np.array_equal(np.sort(line[shards] + members), piece):
            raise ValueError(f"lane {lane} does not go through its piece of the epoch")


def _begin(problem: PlanProblem, folder: Path, slots: Slots) -> list[ShardReader]:
    """Locate the first batch as a reader process does."""
    shards = ShardSet.open(folder, look=False)
    _, numbers, _ = problem.order(shards).locate(slots)
    return [ShardReader(shards.shard(number)) for number in set(numbers.tolist())]


def _seconds(problem: PlanProblem, folder: Path, slots: Slots) -> float:
    started = time.perf_counter()
    _begin(problem, folder, slots)
    return time.perf_counter() - started


def _added(problem: PlanProblem, folder: Path, slots: Slots) -> int:
    return extra_peak(partial(_begin, problem, folder, slots))
