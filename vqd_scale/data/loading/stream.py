"""Infinite, exactly resumable stream of training batches of one rank."""

import itertools
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
import torch

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.s3 import S3Path
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import Batch, BatchType
from vqd_scale.data.loading.prefetch import in_processes, in_thread
from vqd_scale.data.loading.sample_readers import Columns, SampleKind, SampleLocation, Slots
from vqd_scale.data.order.balance import BalancedOrder, classes_of
from vqd_scale.data.order.mixture import shares
from vqd_scale.data.order.plan import LaneOrder, Order, Plan, SampleLocations, names_of, owned_lanes
from vqd_scale.data.shards.quarantine import Quarantine
from vqd_scale.data.shards.ranged_reader import RangedReader
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import ShardReader

_ShardNumber = tuple[int, int]
"""Dataset number and shard number in the dataset."""

OPEN_SHARDS = 64
"""Minimum limit of open shards per reader, tables included; the limit is two per lane if that is more."""

OPEN_SHARDS_BALANCED = 512
"""`OPEN_SHARDS` for class-balanced order, which reads at random offsets."""

OPENED_AT_ONCE = 16
"""S3 shards opened in parallel: opening takes two round trips, and a reader starts with >= 1 per lane."""

SLOTS_AT_ONCE = 2048
"""Maximum number of slots planned per call (approximate)."""


class Stream(Generic[BatchType]):
    """Infinite stream of one rank's part of the global batches, starting at a cursor.

    Global batch k contains the k-th ``global_batch_size`` slots after the cursor, for any number of ranks and
    workers: rank r reads the slots of its part, and the ranks' parts, concatenated in rank order, are the
    batch. The sample of a slot depends on ``lanes``, which equal the batch size unless it changed during the
    run. A bad sample keeps its slot with ``valid`` false and is reported to the quarantine.

    Args:
        config: Datasets and sample order.
        kind: Sample kind.
        seed: Seed of the run.
        rank: This rank.
        ranks: Number of ranks; must divide the global batch size.
        cursor: Global slots already consumed.
        quarantine: Path of this rank's report of bad samples.
        pinned: Return batches in pinned memory, for asynchronous copies to a GPU.

    Raises:
        UserError: A dataset cannot be opened, or the ranks do not divide the global batch size; while
            iterating, if too many samples are bad or a shard is damaged.

    Attributes:
        items: Total number of samples of all datasets; of captions with ``captions=each``.
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
        self._sets = tuple(ShardSet.open(source.path, look=rank == 0) for source in config.mixed)
        self._config = config
        self._kind = kind
        self._seed = seed
        self._lanes = owned_lanes(config.global_batch_size, rank, ranks)
        items = [sum(_counts(config, shards)) for shards in self._sets]
        self.items = sum(items)
        self._tolerated = [config.max_bad_fraction * count / ranks for count in items]
        self._classes = [classes_of(shards) for shards in self._sets] if config.class_balanced else None
        self._cursor = cursor
        self._quarantine = Quarantine(quarantine)
        self._pinned = pinned

    def __iter__(self) -> Generator[BatchType]:
        """Yield batches without end; closing the iterator ends its thread and processes."""
        bad_by_epoch = Counter[tuple[int, int]]()
        with closing(in_thread(self._batches, self._config.prefetch_batches)) as batches:
            for batch, bad_samples in batches:
                for sample in bad_samples:
                    bad_by_epoch[sample.set, sample.epoch] += 1
                    self._report(sample, bad_by_epoch[sample.set, sample.epoch])
                yield batch

    def _batches(self, is_closed: threading.Event) -> "Generator[tuple[BatchType, list[_BadSample]]]":
        workers = min(self._config.num_workers, len(self._lanes))
        lanes = np.array_split(np.asarray(self._lanes, dtype=np.int64), max(1, workers))
        readers = [
            _PartReader(self._sets, self._classes, self._config, self._kind, self._seed, self._cursor + slots)
            for slots in lanes
        ]
        parts = in_processes(readers, self._config.prefetch_batches, is_closed) if workers else readers[0]()
        with closing(parts):
            while group := list(itertools.islice(parts, len(readers))):
                batch = self._kind.batch(_joined([columns for columns, _ in group]))
                bad_samples = [sample for _, part_samples in group for sample in part_samples]
                yield batch.pin_memory() if self._pinned else batch, bad_samples

    def _report(self, sample: "_BadSample", count: int) -> None:
        self._quarantine.extend([(sample.shard, sample.key, sample.reason)])
        if count > self._tolerated[sample.set]:
            raise UserError(
                f"{self._sets[sample.set].folder}: more than max_bad_fraction={self._config.max_bad_fraction}"
                f" of the samples cannot be used; '{sample.key}' for one {sample.reason}; "
                f"{self._quarantine.path} lists them."
            )


@dataclass(frozen=True)
class _BadSample:
    set: int
    epoch: int
    shard: str
    key: str
    reason: str


_Part = tuple[Columns, list[_BadSample]]
"""Rows of a batch that one reader has read, and the bad samples among them."""


@dataclass(frozen=True)
class _PartReader:
    """Reader of a part of every global batch; picklable. ``slots`` are its slots in the first batch."""

    sets: Sequence[ShardSet]
    classes: Sequence[NDArray[np.int32]] | None
    config: StreamConfig
    kind: SampleKind[Batch]
    seed: int
    slots: Slots

    def __call__(self) -> Generator[_Part]:
        regular = self.config.lanes == self.config.global_batch_size
        lanes = len(self.slots) if regular else self.config.lanes
        window = 1 if self.config.class_balanced else self.config.shuffle_window
        reading = RangedReader.in_lanes(self.sets, lanes, window, self.config.ranged_reads)
        max_open = max(OPEN_SHARDS_BALANCED if self.config.class_balanced else OPEN_SHARDS, 2 * lanes)
        opened = _OpenShards(self.sets, reading, max_open)
        ahead = deque[_Planned]()
        for planned in self._plan_batches(self._build_plan()):
            planned.locations.extend(self._locations(planned, opened))
            for location in planned.locations if reading.turns else ():
                location.reader.expect(location.member)
            ahead.append(planned)
            if len(ahead) > reading.turns:
                yield self._read(ahead.popleft())

    def _build_plan(self) -> Plan:
        config, seed = self.config, self.seed
        mixed = shares([source.weight for source in config.mixed], config.lanes)
        orders: list[Order] = []
        for number, (shards, share) in enumerate(zip(self.sets, mixed, strict=True)):
            counts, name = _counts(config, shards), names_of(number)
            if self.classes is None:
                orders.append(LaneOrder(counts, share, config.shuffle_window, seed, name))
            else:
                orders.append(BalancedOrder(self.classes[number], counts, share, seed, name))
        return Plan(mixed, orders)

    def _locations(self, planned: "_Planned", opened: "_OpenShards") -> list[SampleLocation]:
        """Open the shards of a planned batch and select the captions."""
        readers, members = opened.readers(planned.positions), planned.positions.members.tolist()
        if self.config.captions == "each":
            captioned = zip(readers, members, strict=True)
            return [SampleLocation(reader, *reader.captioned(caption)) for reader, caption in captioned]
        if self.config.captions == "first":
            return list(map(SampleLocation, readers, members))
        slots = torch.from_numpy(planned.slots)
        uniform_numbers = uniforms(self.seed, Purpose.CAPTION_CHOICE, slots, 1)[:, 0].tolist()
        return [
            SampleLocation(reader, member, int(share * reader.captions(member)))
            for reader, member, share in zip(readers, members, uniform_numbers, strict=True)
        ]

    def _plan_batches(self, plan: Plan) -> Iterator["_Planned"]:
        """Plan batches in order; planned batches per call double from 1, so that the first batch is fast."""
        lanes, first, batches = len(self.slots), 0, 1
        while True:
            turns = np.arange(first, first + batches, dtype=np.int64)
            slots = (turns[:, None] * self.config.global_batch_size + self.slots).reshape(-1)
            positions = plan.locate(slots)
            for start in range(0, len(slots), lanes):
                rows = slice(start, start + lanes)
                yield _Planned(slots[rows], positions[rows], [])
            first += batches
            batches = max(1, min(2 * batches, SLOTS_AT_ONCE // lanes))

    def _read(self, planned: "_Planned") -> _Part:
        locations, slots = planned.locations, planned.slots
        columns, errors = self.kind.read(locations, slots, self.seed)
        rows, valid = list(errors), np.ones(len(slots), np.bool_)
        valid[rows] = False
        keys = np.array([location.reader.key(location.member) for location in locations], dtype=np.object_)
        sets, epochs = planned.positions.sets[rows].tolist(), planned.positions.epochs[rows].tolist()
        shards = [locations[row].reader.shard.path.name for row in rows]
        reports = list(map(_BadSample, sets, epochs, shards, keys[rows], errors.values()))
        return {**columns, "slots": slots, "valid": valid, "keys": keys}, reports


@dataclass(frozen=True)
class _Planned:
    """Planned batch; its shards are opened shortly before it is read."""

    slots: Slots
    positions: SampleLocations
    locations: list[SampleLocation]


class _OpenShards:
    """LRU cache of open shards."""

    def __init__(self, sets: Sequence[ShardSet], reading: RangedReader, max_open: int) -> None:
        self._sets, self._reading, self._max_open = sets, reading, max_open
        self._open = OrderedDict[_ShardNumber, ShardReader]()

    def readers(self, positions: SampleLocations) -> list[ShardReader]:
        """Return the shard reader of each sample, opening shards that are not open yet."""
        numbers = list(zip(positions.sets.tolist(), positions.shards.tolist(), strict=True))
        unopened = list({number: None for number in numbers if number not in self._open})
        if len(unopened) > 1 and any(isinstance(shards.tars, S3Path) for shards in self._sets):
            with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
                self._open.update(zip(unopened, pool.map(self._opened, unopened), strict=True))
        else:
            self._open.update({number: self._opened(number) for number in unopened})
        for number in numbers:
            self._open.move_to_end(number)
        readers = [self._open[number] for number in numbers]
        while len(self._open) > self._max_open:
            self._open.popitem(last=False)
        return readers

    def _opened(self, number: _ShardNumber) -> ShardReader:
        set_number, shard = number
        return ShardReader(self._sets[set_number].shard(shard), self._reading)


def _counts(config: StreamConfig, shards: ShardSet) -> tuple[int, ...]:
    """Return the number of items per shard: samples, or captions with ``captions=each``."""
    return shards.captions if config.captions == "each" else shards.counts


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
