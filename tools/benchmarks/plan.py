"""The order of a very large set, begun and taken up again by single ones of very many reading processes."""

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
from vqd_scale.data.shards.shard_index import (
    IndexedShard,
    ShardSet,
    begin_set,
    finish_set,
    publish_table,
    table_of,
)
from vqd_scale.data.shards.shard_io import ShardReader, shard_name

_LANES_WALKED = 64
"""So many lanes are read through to their ends when it is checked that every sample comes once."""

_BYTES = 4096
"""Size of a shard's file, which is a hole: only its table is read."""


@dataclass(frozen=True)
class PlanProblem:
    """A set and who reads it; by default LAION-400M as img2dataset makes it, on a thousand GPUs.

    Attributes:
        shards: How many.
        samples: In each shard.
        ranks: How many.
        workers: Reading processes of each; a lane for each of all ranks'.
        shuffle_window: Over how many neighbours of its lane a sample may be moved.
    """

    shards: int = 41_408
    samples: int = 10_000
    ranks: int = 1_024
    workers: int = 8
    shuffle_window: int = 1_000

    @property
    def lanes(self) -> int:
        """One for each reading process."""
        return self.ranks * self.workers

    @property
    def total(self) -> int:
        """Samples of an epoch."""
        return self.shards * self.samples

    def order(self, shards: ShardSet | None = None) -> LaneOrder:
        """The order of the set, its counts known or read."""
        counts = [self.samples] * self.shards if shards is None else shards.counts
        (share,) = shares([1], self.lanes)
        return LaneOrder(counts, share, self.shuffle_window, seed=0)

    def first_slots(self, worker: int, place: float) -> Slots:
        """The slots of a reading process's first batch from a place in the epoch on, 0 to 1."""
        rank, of_rank = divmod(worker, self.workers)
        lanes = np.array_split(np.asarray(owned_lanes(self.lanes, rank, self.ranks)), self.workers)[of_rank]
        return int(self.total * place) // self.lanes * self.lanes + lanes.astype(np.int64)

    def write(self, folder: Path, tables: Sequence[int]) -> None:
        """Write the set's index, and the tables of a few shards: all of them would be 40 GB."""
        names = [shard_name(number) for number in range(self.shards)]
        found = [
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
                (f"{number:09d}", dict.fromkeys(extensions, (512, 1024)), {"captions": 1.0})
                for number in range(self.samples)
            ]
        )
        for number in tables:
            publish_table(folder / f"{number:06d}.npz", table, found[number])
        finish_set(folder, {"content": "images"}, found)


def benchmark_plan(rounds: int, problem: PlanProblem | None = None) -> dict[str, Any]:
    """What it takes a process to know what it reads next: seconds, and megabytes added to the process.

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
            median(seconds for seconds, _ in found) for (_, of), found in figures.items() if of == place
        )
        for place in (0, 0.9)
    }
    return {
        "seconds": round(by_place[0], 4),
        "seconds_at_nine_tenths": round(by_place[0.9], 4),
        "megabytes": round(max(added for found in figures.values() for _, added in found) / 1e6, 2),
        "shape": [problem.shards, problem.samples, problem.ranks, problem.workers],
        "lanes_walked": min(_LANES_WALKED, problem.lanes),
        "all_seconds": [round(seconds, 4) for found in figures.values() for seconds, _ in found],
    }


def check_complete(problem: PlanProblem, walked: int) -> None:
    """See that an epoch holds every sample exactly once, whoever reads it.

    The pieces of all lanes together are the epoch's line of samples, and the line is one order of the shards;
    so it is left to see that a lane goes through its own piece. ``walked`` lanes, evenly chosen, are asked
    for every one of their slots, and must give the samples of their pieces, each once.

    Raises:
        ValueError: They do not.
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
    """What a reading process does before its first sample."""
    shards = ShardSet.open(folder, look=False)
    _, numbers, _ = problem.order(shards).locate(slots)
    return [ShardReader(shards.shards[number]) for number in set(numbers.tolist())]


def _seconds(problem: PlanProblem, folder: Path, slots: Slots) -> float:
    started = time.perf_counter()
    _begin(problem, folder, slots)
    return time.perf_counter() - started


def _added(problem: PlanProblem, folder: Path, slots: Slots) -> int:
    return extra_peak(partial(_begin, problem, folder, slots))
