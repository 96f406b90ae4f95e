"""The endless, exactly resumable stream of batches that a rank trains on."""

import itertools
import multiprocessing
import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.store import Location
from vqd_scale.data.batch import pinned
from vqd_scale.data.index import ShardSet
from vqd_scale.data.mixture import Share, shares
from vqd_scale.data.plan import LaneOrder, Places, Plan, owned_lanes
from vqd_scale.data.quarantine import Quarantine
from vqd_scale.data.reading import Reading, ReadingConfig
from vqd_scale.data.samples import Columns, Place, SampleKind, Slots
from vqd_scale.data.shards import ShardReader

BatchType = TypeVar("BatchType")
Item = TypeVar("Item")
_ShardNumber = tuple[int, int]
"""A set's number and that of a shard in it."""

OPEN_SHARDS = 64
"""At least so many shards a reader keeps open, tables included; two per lane where there are more lanes."""

OPENED_AT_ONCE = 16
"""A distant shard takes two round trips to open, and a reader begins with one or more for each lane."""


SLOTS_AT_ONCE = 4096
"""For about so many slots the plan is made at a time."""


class SourceConfig(Config):
    """One of several sets that are mixed.

    Attributes:
        path: Folder of the shards, here or in S3.
        weight: Its part of every batch, in proportion to the other weights; kept exactly.
    """

    path: Location
    weight: float = Field(default=1.0, gt=0)


class StreamConfig(Config):
    """What is read, and in which order.

    Attributes:
        path: Folder of the shards, here or in S3.
        sources: In place of ``path``, several sets that are mixed.
        lanes: Global batch: every batch takes one sample from each lane. Part of the order, as the window is.
        shuffle_window: Over how many neighbours of its lane a sample may be moved.
        workers: Reading processes per rank; 0 reads in a thread of the rank's own. Not part of the order.
        prefetch: Batches read ahead.
        max_bad_share: Which share of an epoch may be unusable before the run stops.
        reading: How shards in S3 are read. Not part of the order.
    """

    path: Location | None = None
    sources: tuple[SourceConfig, ...] | None = Field(default=None, min_length=1)
    lanes: int = Field(default=128, ge=1)
    shuffle_window: int = Field(default=256, ge=1)
    workers: int = Field(default=0, ge=0, le=64)
    prefetch: int = Field(default=4, ge=1)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _either_one_or_several(self) -> Self:
        if (self.path is None) == (self.sources is None):
            raise ValueError("give either path, one set of shards, or sources, several that are mixed")
        return self

    @property
    def mixed(self) -> tuple[SourceConfig, ...]:
        """The sets that are read, be it one."""
        return self.sources or (SourceConfig(path=cast(Location, self.path)),)


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
        pinned: Whether batches are to lie where a GPU fetches them while others are computed.

    Raises:
        UserError: A set cannot be opened, the ranks do not divide the lanes, or the cursor was reached with
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
        pinned: bool = False,
    ) -> None:
        if cursor % config.lanes:
            raise UserError(
                f"data.lanes: cannot go on from slot {cursor} with lanes={config.lanes}, which does not "
                "divide it; set lanes to what the run began with."
            )
        self._sets = tuple(ShardSet.open(source.path, look=rank == 0) for source in config.mixed)
        self._config = config
        self._kind = kind
        self._seed = seed
        self._lanes = owned_lanes(config.lanes, rank, ranks)
        self._shares = shares([source.weight for source in config.mixed], config.lanes)
        self._tolerated = [config.max_bad_share * shards.count / ranks for shards in self._sets]
        self._cursor = cursor
        self._quarantine = Quarantine(quarantine)
        self._pinned = pinned

    @property
    def samples(self) -> int:
        """Samples in all sets together."""
        return sum(shards.count for shards in self._sets)

    def __iter__(self) -> Generator[BatchType]:
        """Batches for ever; closing the iterator ends its thread and processes."""
        bad_by_epoch = Counter[tuple[int, int]]()
        with closing(_in_thread(self._batches, self._config.prefetch)) as batches:
            for batch, found in batches:
                for bad in found:
                    bad_by_epoch[bad.set, bad.epoch] += 1
                    self._report(bad, bad_by_epoch[bad.set, bad.epoch])
                yield batch

    def _batches(self, is_closed: threading.Event) -> "Generator[tuple[BatchType, list[_Bad]]]":
        workers = min(self._config.workers, len(self._lanes))
        lanes = np.array_split(np.asarray(self._lanes, dtype=np.int64), max(1, workers))
        readers = [
            _PartReader(self._sets, self._shares, self._config, self._kind, self._seed, self._cursor + own)
            for own in lanes
        ]
        parts = _in_processes(readers, self._config.prefetch, is_closed) if workers else readers[0]()
        with closing(parts):
            while group := list(itertools.islice(parts, len(readers))):
                batch = self._kind.batch(_joined([part.columns for part in group]))
                yield pinned(batch) if self._pinned else batch, [bad for part in group for bad in part.bad]

    def _report(self, bad: "_Bad", count: int) -> None:
        self._quarantine.add(bad.shard, bad.key, bad.reason)
        if count > self._tolerated[bad.set]:
            raise UserError(
                f"{self._sets[bad.set].folder}: more than max_bad_share={self._config.max_bad_share} of the "
                f"samples cannot be used; '{bad.key}' for one {bad.reason}; {self._quarantine.path} lists "
                "them."
            )


@dataclass(frozen=True)
class _Bad:
    set: int
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

    sets: Sequence[ShardSet]
    shares: Sequence[Share]
    config: StreamConfig
    kind: SampleKind[object]
    seed: int
    slots: Slots

    def __call__(self) -> Generator[_Part]:
        lanes, window = len(self.slots), self.config.shuffle_window
        plan = Plan(
            self.shares,
            [
                LaneOrder(shards.counts, share, window, self.seed, number)
                for number, (shards, share) in enumerate(zip(self.sets, self.shares, strict=True))
            ],
        )
        reading = Reading.in_lanes(self.sets, lanes, window, self.config.reading)
        opened = _OpenShards(self.sets, reading, max(OPEN_SHARDS, 2 * lanes))
        ahead = deque[_Planned]()
        for planned in self._planned(plan):
            planned.places.extend(opened.places(planned.found))
            for place in planned.places:
                place.reader.expect(place.member)
            ahead.append(planned)
            if len(ahead) > reading.tempo.turns:
                yield self._read(ahead.popleft())

    def _planned(self, plan: Plan) -> Iterator["_Planned"]:
        """One batch after the other, located many at a time."""
        lanes, batches = len(self.slots), max(1, SLOTS_AT_ONCE // len(self.slots))
        for first in itertools.count(0, batches):
            turns = np.arange(first, first + batches, dtype=np.int64)
            slots = (turns[:, None] * self.config.lanes + self.slots).reshape(-1)
            found = plan.locate(slots)
            for start in range(0, len(slots), lanes):
                rows = slice(start, start + lanes)
                yield _Planned(slots[rows], found[rows], [])

    def _read(self, planned: "_Planned") -> _Part:
        places, slots = planned.places, planned.slots
        columns, bad = self.kind.read(places, slots, self.seed)
        valid = np.ones(len(slots), np.bool_)
        valid[list(bad)] = False
        keys = np.array([place.reader.key(place.member) for place in places], dtype=np.object_)
        found = planned.found
        reports = [
            _Bad(
                int(found.sets[row]),
                int(found.epochs[row]),
                places[row].reader.shard.path.name,
                keys[row],
                reason,
            )
            for row, reason in bad.items()
        ]
        return _Part({**columns, "slots": slots, "valid": valid, "keys": keys}, reports)


@dataclass(frozen=True)
class _Planned:
    """A batch that is to be read; its shards are opened when its turn comes nearer."""

    slots: Slots
    found: Places
    places: list[Place]


class _OpenShards:
    """The shards that a reader keeps open; those used longest ago are closed first."""

    def __init__(self, sets: Sequence[ShardSet], reading: Reading, most: int) -> None:
        self._sets, self._reading, self._most = [shards.shards for shards in sets], reading, most
        self._open = OrderedDict[_ShardNumber, ShardReader]()

    def places(self, found: Places) -> list[Place]:
        """The samples in their shards, which are opened where they are not."""
        numbers = list(zip(found.sets.tolist(), found.shards.tolist(), strict=True))
        readers = self._readers(numbers)
        return [Place(*place) for place in zip(readers, found.members.tolist(), strict=True)]

    def _readers(self, numbers: Sequence[_ShardNumber]) -> list[ShardReader]:
        absent = list({number: None for number in numbers if number not in self._open})
        if len(absent) > 1 and any(isinstance(shards[0].path, S3Path) for shards in self._sets):
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

    def _opened(self, number: _ShardNumber) -> ShardReader:
        of, shard = number
        return ShardReader(self._sets[of][shard], self._reading)


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _in_thread(produce: Callable[[threading.Event], Generator[Item]], depth: int) -> Generator[Item]:
    """What a generator yields, read ahead in a thread; what it raises is raised here.

    Args:
        produce: Makes the generator; the event tells it, where it waits, that nobody wants more.
        depth: How many items are kept.
    """
    ready: queue.Queue[Item | _Raised] = queue.Queue(depth)
    is_closed = threading.Event()

    def offer(item: Item | _Raised) -> None:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        # Whatever it is, it belongs to the consumer: dying here would leave the consumer waiting for ever.
        try:
            with closing(produce(is_closed)) as items:
                for item in items:
                    offer(item)
                    if is_closed.is_set():
                        return
        except Exception as error:  # noqa: BLE001
            offer(_Raised(error))

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        is_closed.set()
        thread.join()


@dataclass(frozen=True)
class _Raised:
    error: Exception


def _in_processes(readers: Sequence[_PartReader], depth: int, is_closed: threading.Event) -> Generator[_Part]:
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
            while not connection.poll(0.1):
                if is_closed.is_set():
                    return
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
        for part in _in_thread(lambda _: reader(), depth):
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
