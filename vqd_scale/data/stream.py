"""The endless, exactly resumable stream of batches that a rank trains on."""

import itertools
import multiprocessing
import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from pydantic import Field

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.store import Location
from vqd_scale.data.index import Shard, ShardSet
from vqd_scale.data.plan import Places, Plan, owned_lanes
from vqd_scale.data.quarantine import Quarantine
from vqd_scale.data.reading import Reading, ReadingConfig
from vqd_scale.data.samples import Columns, Place, SampleKind, Slots
from vqd_scale.data.shards import ShardReader

BatchType = TypeVar("BatchType")

OPEN_SHARDS = 64
"""At least so many shards a reader keeps open, tables included; two per lane where there are more lanes."""

OPENED_AT_ONCE = 16
"""A distant shard takes two round trips to open, and a reader begins with one or more for each lane."""


class StreamConfig(Config):
    """What is read, and in which order.

    Attributes:
        path: Folder of the shards, here or in S3.
        lanes: Global batch: every batch takes one sample from each lane. Part of the order, as the window is.
        shuffle_window: Over how many neighbours of its lane a sample may be moved.
        workers: Reading processes per rank; 0 reads in a thread of the rank's own. Not part of the order.
        prefetch: Batches read ahead.
        max_bad_share: Which share of an epoch may be unusable before the run stops.
        reading: How shards in S3 are read. Not part of the order.
    """

    path: Location
    lanes: int = Field(default=128, ge=1)
    shuffle_window: int = Field(default=256, ge=1)
    workers: int = Field(default=0, ge=0, le=64)
    prefetch: int = Field(default=4, ge=1)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    reading: ReadingConfig = ReadingConfig()


class Stream(Generic[BatchType]):
    """This rank's part of the global batches, from a cursor on, for ever.

    Global batch k holds slots ``k * lanes`` to ``(k + 1) * lanes - 1`` and is the same at any number of ranks
    and workers: rank r's part is the slots of its lanes, and the ranks' parts one after the other are the
    batch. A sample that cannot be used keeps its slot with ``valid`` false and is reported to the quarantine.

    Args:
        config: What is read, and in which order.
        kind: What the samples are.
        seed: The run's seed.
        rank: This rank.
        ranks: Number of ranks; divides the lanes.
        cursor: Global slots consumed before; a multiple of the lanes.
        quarantine: This rank's report of bad samples.

    Raises:
        UserError: The set cannot be opened, the ranks do not divide the lanes, or the cursor was reached with
            another number of lanes; while iterating, if too many samples are bad or a shard is damaged.
    """

    def __init__(
        self,
        config: StreamConfig,
        kind: SampleKind[BatchType],
        *,
        seed: int,
        rank: int,
        ranks: int,
        cursor: int,
        quarantine: Path,
    ) -> None:
        if cursor % config.lanes:
            raise UserError(
                f"{config.path}: cannot go on from slot {cursor} with lanes={config.lanes}, which does not "
                "divide it; set lanes to what the run began with."
            )
        self.shards = ShardSet.open(config.path, look=rank == 0)
        self._config = config
        self._kind = kind
        self._seed = seed
        self._lanes = owned_lanes(config.lanes, rank, ranks)
        self._tolerated = config.max_bad_share * self.shards.count / ranks
        self._cursor = cursor
        self._quarantine = Quarantine(quarantine)

    def __iter__(self) -> Generator[BatchType]:
        """Batches for ever; closing the iterator ends its thread or processes."""
        workers = min(self._config.workers, len(self._lanes))
        bad_by_epoch = Counter[int]()
        with closing(self._read_ahead(workers)) as parts:
            while True:
                group = [next(parts) for _ in range(max(1, workers))]
                for bad in (bad for part in group for bad in part.bad):
                    bad_by_epoch[bad.epoch] += 1
                    self._report(bad, bad_by_epoch[bad.epoch])
                yield self._kind.batch(_joined([part.columns for part in group]))

    def _read_ahead(self, workers: int) -> "Generator[_Part]":
        lanes = np.array_split(np.asarray(self._lanes, dtype=np.int64), max(1, workers))
        readers = [
            _PartReader(self.shards, self._config, self._kind, self._seed, self._cursor + own)
            for own in lanes
        ]
        if workers == 0:
            return _in_thread(readers[0], self._config.prefetch)
        return _in_processes(readers, self._config.prefetch)

    def _report(self, bad: "_Bad", count: int) -> None:
        self._quarantine.add(bad.shard, bad.key, bad.reason)
        if count > self._tolerated:
            raise UserError(
                f"{self.shards.folder}: more than max_bad_share={self._config.max_bad_share} of the samples "
                f"cannot be used; '{bad.key}' for one {bad.reason}; {self._quarantine.path} lists them."
            )


@dataclass(frozen=True)
class _Bad:
    epoch: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class _Part:
    """The rows of a batch that one reader read."""

    columns: Columns
    bad: list[_Bad]


@dataclass(frozen=True)
class _PartReader:
    """One reader's part of every global batch, its ``slots`` being those of the first; picklable."""

    shards: ShardSet
    config: StreamConfig
    kind: SampleKind[object]
    seed: int
    slots: Slots

    def __call__(self) -> Iterator[_Part]:
        lanes, window = len(self.slots), self.config.shuffle_window
        plan = Plan(self.shards.counts, self.config.lanes, window, self.seed)
        reading = Reading.in_lanes(self.shards, lanes, window, self.config.reading)
        ahead = deque[tuple[Slots, Places, list[Place]]]()
        slots = self.slots
        opened = _OpenShards(self.shards.shards, reading, max(OPEN_SHARDS, 2 * lanes))
        while True:
            found = plan.locate(slots)
            places = list(zip(opened[found.shards.tolist()], found.members.tolist(), strict=True))
            for reader, member in places:
                reader.expect(member)
            ahead.append((slots, found, places))
            slots = slots + self.config.lanes
            if len(ahead) > reading.tempo.turns:
                yield self._read(*ahead.popleft())

    def _read(self, slots: Slots, found: Places, places: list[Place]) -> _Part:
        columns, bad = self.kind.read(places, slots, self.seed)
        valid = np.ones(len(slots), np.bool_)
        valid[list(bad)] = False
        keys = np.array([reader.key(member) for reader, member in places], dtype=np.object_)
        reports = [
            _Bad(int(found.epochs[row]), places[row][0].shard.path.name, keys[row], reason)
            for row, reason in bad.items()
        ]
        return _Part({**columns, "slots": slots, "valid": valid, "keys": keys}, reports)


class _OpenShards:
    """The shards that a reader keeps open; those used longest ago are closed first."""

    def __init__(self, shards: Sequence[Shard], reading: Reading, most: int) -> None:
        self._shards, self._reading, self._most = shards, reading, most
        self._open = OrderedDict[int, ShardReader]()

    def __getitem__(self, numbers: Sequence[int]) -> list[ShardReader]:
        """The readers of shards, opened where they are not."""
        absent = list({number: None for number in numbers if number not in self._open})
        if len(absent) > 1 and isinstance(self._shards[0].path, S3Path):
            with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
                self._open.update(zip(absent, pool.map(self._opened, absent), strict=True))
        else:
            self._open.update({number: self._opened(number) for number in absent})
        for number in numbers:
            self._open.move_to_end(number)
        readers = [self._open[number] for number in numbers]
        while len(self._open) > self._most:
            self._open.popitem(last=False)
        return readers

    def _opened(self, number: int) -> ShardReader:
        return ShardReader(self._shards[number], self._reading)


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _in_thread(reader: _PartReader, depth: int) -> Generator[_Part]:
    """The reader's parts, read ahead in a thread; what it raises is raised here."""
    ready: queue.Queue[_Part | Exception] = queue.Queue(depth)
    is_closed = threading.Event()

    def offer(item: _Part | Exception) -> None:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        # Whatever it is, it belongs to the consumer: dying here would leave the consumer waiting for ever.
        try:
            for part in reader():
                offer(part)
                if is_closed.is_set():
                    return
        except Exception as error:  # noqa: BLE001
            offer(error)

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        is_closed.set()
        thread.join()


def _in_processes(readers: Sequence[_PartReader], depth: int) -> Generator[_Part]:
    """The readers' parts, each reader in a process: the first one's of a batch, then the second one's."""
    # Spawned, since neither S3 clients nor the threads of torch survive a fork.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for reader in readers:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(reader, depth, theirs), daemon=True)
            process.start()
            # With this end open in one process only, its death is an end of file and not an endless wait.
            theirs.close()
            connections.append(ours)
            processes.append(process)
        for connection in itertools.cycle(connections):
            yield _received(connection)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for connection in connections:
            connection.close()


def _serve(reader: _PartReader, depth: int, connection: Connection) -> None:
    """A reading process: reads ahead in a thread, and sends."""
    # There are as many such processes as cores can be spared.
    torch.set_num_threads(1)
    try:
        for part in _in_thread(reader, depth):
            connection.send(part)
    except UserError as error:
        connection.send(error)


def _received(connection: Connection) -> _Part:
    try:
        item = connection.recv()
    except EOFError:
        raise RuntimeError("a reading process died; what it printed above says why") from None
    if isinstance(item, UserError):
        raise item
    return item
