"""Stateless sample order: the sample of each global slot, as a pure function of (seed, slot).

The shards of an epoch are shuffled and their samples laid end to end. This line is cut into ``lanes`` pieces.
Global batch k takes the next sample of every lane. Each lane is read sequentially and shuffled within a
window. Global slot g is in epoch ``g // samples``, lane ``g % lanes`` and batch ``g // lanes``. Epochs follow
each other without a gap, so a batch may contain the end of one epoch and the start of the next. The
``samples`` slots of an epoch contain every sample exactly once.

Example: shards A (3 samples) and B (5), 2 lanes, shuffle window 2, seed 0. Epoch 0 shuffles the shards to
B, A. The line B0 B1 B2 B3 B4 A0 A1 A2 is cut into lane 0 = B0 … B3 and lane 1 = B4 … A2::

    slot    0  1   2  3   4  5   6  7
    batch   0  0   1  1   2  2   3  3
    lane    0  1   0  1   0  1   0  1
    sample  B1 B4  B0 A0  B2 A1  B3 A2    window (B0, B1) is reversed, the other three keep their order

In a mixture, each dataset owns a share of the slots (`vqd_scale.data.order.mixture`) and has its own epochs.
The rules above then apply per dataset, with only its own slots counted. The length of a lane's piece is the
number of the dataset's slots in this lane.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.order.mixture import MixtureShare, Slots

_NAMES = 1 << 48


def names_of(number: int) -> int:
    """Return a dataset's first random-stream id; the id ranges of different datasets do not overlap."""
    return number * _NAMES


@dataclass(frozen=True)
class SampleLocations:
    """Sample locations: row i is slot i's dataset, dataset epoch, shard and sample index in the shard."""

    sets: Slots
    epochs: Slots
    shards: Slots
    members: Slots

    def __getitem__(self, rows: slice) -> "SampleLocations":
        """Return a slice of the rows."""
        return SampleLocations(self.sets[rows], self.epochs[rows], self.shards[rows], self.members[rows])


class Order(Protocol):
    """Sample order of one dataset."""

    def locate(self, slots: Slots) -> tuple[Slots, Slots, Slots]:
        """Return epoch, shard and index in the shard for slots of the dataset (int64 >= 0, any order)."""
        ...


class Plan:
    """Sample order of a whole mixture.

    Args:
        shares: Slots of each dataset.
        orders: Sample order of each dataset.
    """

    def __init__(self, shares: Sequence[MixtureShare], orders: Sequence[Order]) -> None:
        self._sets = list(zip(shares, orders, strict=True))

    def locate(self, slots: Slots) -> SampleLocations:
        """Locate the sample of each global slot (int64 >= 0, any order)."""
        columns = np.empty((4, len(slots)), np.int64)
        for number, (share, order) in enumerate(self._sets):
            rows = np.flatnonzero(share.owns(slots))
            if len(rows):
                columns[0, rows] = number
                columns[1, rows], columns[2, rows], columns[3, rows] = order.locate(slots[rows])
        return SampleLocations(*columns)


@dataclass(frozen=True)
class _Epoch:
    """Layout of one epoch: shard order and each lane's piece of the line of samples.

    Attributes:
        shards: Shard numbers, shuffled.
        starts: Start of each shard in the line.
        lane_starts: Start of each lane's piece in the line.
        lane_lengths: Samples in each lane's piece.
        turns: Number of the dataset's slots in each lane before this epoch.
    """

    shards: Slots
    starts: Slots
    lane_starts: Slots
    lane_lengths: Slots
    turns: Slots


class LaneOrder:
    """Sample order of one dataset with sequentially read lanes; see the module docstring.

    Args:
        counts: Samples in each shard, in index order.
        share: Slots of the dataset.
        shuffle_window: Number of neighboring samples of a lane that are shuffled together.
        seed: Seed of the run.
        name: First random-stream id of the dataset; see `names_of`.

    Raises:
        UserError: The dataset has no sample.
    """

    def __init__(
        self, counts: Sequence[int], share: MixtureShare, shuffle_window: int, seed: int, name: int = 0
    ) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self._counts.sum())
        self._share = share
        self._window = shuffle_window
        self._seed = seed
        self._name = name
        # Caches of pure functions: two epochs, and the windows of the last call.
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[int, NDArray[np.int64]] = {}
        if self.samples == 0:
            raise UserError("a set of shards without samples cannot be read; make it again.")

    def locate(self, slots: Slots) -> tuple[Slots, Slots, Slots]:
        """Implement `Order.locate`."""
        epochs = self._share.before(slots) // self.samples
        shards, members = np.empty_like(slots), np.empty_like(slots)
        windows: dict[int, NDArray[np.int64]] = {}
        for number in np.unique(epochs).tolist():
            in_epoch = epochs == number
            epoch = self.epoch(number)
            positions = self._positions(slots[in_epoch], epoch, windows)
            shard_positions = np.searchsorted(epoch.starts, positions, side="right") - 1
            shards[in_epoch] = epoch.shards[shard_positions]
            members[in_epoch] = positions - epoch.starts[shard_positions]
        self._windows = windows
        return epochs, shards, members

    def epoch(self, number: int) -> _Epoch:
        """Return the layout of an epoch, cached."""
        if number not in self._epochs:
            shards = permutation(self._seed, Purpose.SHARD_ORDER, self._name + number, len(self._counts))
            counts = self._counts[shards]
            lanes = np.arange(self._share.lanes, dtype=np.int64)
            begin, end = (
                self._share.turns(lanes, np.full_like(lanes, self._share.slot(epoch * self.samples)))
                for epoch in (number, number + 1)
            )
            lengths = end - begin
            layout = _Epoch(shards, np.cumsum(counts) - counts, np.cumsum(lengths) - lengths, lengths, begin)
            self._epochs = {n: self._epochs[n] for n in sorted(self._epochs)[-1:]} | {number: layout}
        return self._epochs[number]

    def _positions(self, slots: Slots, epoch: _Epoch, windows: dict[int, NDArray[np.int64]]) -> Slots:
        """Return each slot's position in its epoch's line of samples; add the windows used to ``windows``.

        A window's random-stream id is computed from its lane and the lane's first turn in the window.
        """
        lanes = slots % self._share.lanes
        turns = self._share.turns(lanes, slots) - epoch.turns[lanes]
        firsts = turns // self._window * self._window
        names = self._name + (epoch.turns[lanes] + firsts) * self._share.lanes + lanes
        lengths = np.minimum(self._window, epoch.lane_lengths[lanes] - firsts)
        _, one_of_each, window_of_slot = np.unique(names, return_index=True, return_inverse=True)
        orders: list[NDArray[np.int64]] = []
        for name, length in zip(names[one_of_each].tolist(), lengths[one_of_each].tolist(), strict=True):
            order = self._windows.get(name)
            if order is None:
                order = permutation(self._seed, Purpose.LANE_ORDER, name, length)
            windows[name] = order
            orders.append(order)
        window_lengths = lengths[one_of_each]
        shuffled = np.concatenate(orders)[
            (np.cumsum(window_lengths) - window_lengths)[window_of_slot] + turns - firsts
        ]
        return epoch.lane_starts[lanes] + firsts + shuffled


def owned_lanes(lanes: int, rank: int, ranks: int) -> range:
    """Return the lanes that a rank reads: contiguous, so that they span as few shards as possible.

    Raises:
        UserError: The number of lanes is not a multiple of the number of ranks.
    """
    if lanes % ranks:
        raise UserError(
            f"a global batch of {lanes} cannot be shared by {ranks} ranks; make data.global_batch_size a "
            f"multiple of the ranks."
        )
    count = lanes // ranks
    return range(rank * count, (rank + 1) * count)
