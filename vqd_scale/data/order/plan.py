"""Who reads what, as a pure function of (seed, slot): the order of the data has no state.

The shards of an epoch are put in a random order and their samples laid end to end. This line is cut into
``lanes`` pieces; global batch k takes the next sample of every lane, and each lane is read sequentially,
shuffled within a window. Epochs follow each other without a gap: global slot g is in epoch ``g // samples``,
in lane ``g % lanes`` and in batch ``g // lanes``, so a batch may hold the end of one epoch and the start of
the next, and the ``samples`` slots of an epoch hold every sample exactly once.

Where several sets are mixed, each has its share of the slots and goes through epochs of its own over these:
what is said above holds of each, with its own slots counted, and a lane's piece as long as it has such slots.
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
    """The first of the names that the set of this number has for its random orders: no two sets share one."""
    return number * _NAMES


@dataclass(frozen=True)
class SampleLocations:
    """Where the samples of some slots lie: row i is slot i's set, the set's epoch, shard and place in it."""

    sets: Slots
    epochs: Slots
    shards: Slots
    members: Slots

    def __getitem__(self, rows: slice) -> "SampleLocations":
        """Some of the rows."""
        return SampleLocations(self.sets[rows], self.epochs[rows], self.shards[rows], self.members[rows])


class Order(Protocol):
    """The order of one set."""

    def locate(self, slots: Slots) -> tuple[Slots, Slots, Slots]:
        """Epoch, shard and place in it for each of the set's slots, int64 >= 0 in any order."""
        ...


class Plan:
    """The order of all sets together.

    Args:
        shares: Each set's slots.
        orders: Each set's order.
    """

    def __init__(self, shares: Sequence[MixtureShare], orders: Sequence[Order]) -> None:
        self._sets = list(zip(shares, orders, strict=True))

    def locate(self, slots: Slots) -> SampleLocations:
        """The sample of each global slot, int64 >= 0 in any order."""
        found = np.empty((4, len(slots)), np.int64)
        for number, (share, order) in enumerate(self._sets):
            own = np.flatnonzero(share.owns(slots))
            if len(own):
                found[0, own] = number
                found[1, own], found[2, own], found[3, own] = order.locate(slots[own])
        return SampleLocations(*found)


@dataclass(frozen=True)
class _Epoch:
    """An epoch: its shards' order and beginnings in its line, and each lane's piece of the line.

    Attributes:
        shards: The shards in their order.
        starts: Where in the line each of them begins.
        lane_starts: Where in the line each lane's piece begins.
        lane_lengths: How long each piece is.
        turns: How often each lane was the set's turn before.
    """

    shards: Slots
    starts: Slots
    lane_starts: Slots
    lane_lengths: Slots
    turns: Slots


class LaneOrder:
    """The order of a set whose lanes are read sequentially; see the module's first lines.

    Args:
        counts: Samples in each shard, in the index's order.
        share: The set's slots.
        shuffle_window: Over how many neighbours of its lane a sample may be moved.
        seed: The run's seed.
        name: The first of the names of its random orders; see `names_of`.

    Raises:
        UserError: There is no sample.
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
        # Caches of what is a pure function anyway: two epochs, and the windows of the last call.
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[int, NDArray[np.int64]] = {}
        if self.samples == 0:
            raise UserError("a set of shards without samples cannot be read; make it again.")

    def locate(self, slots: Slots) -> tuple[Slots, Slots, Slots]:
        """See `Order`."""
        epochs = self._share.before(slots) // self.samples
        shards, members = np.empty_like(slots), np.empty_like(slots)
        windows: dict[int, NDArray[np.int64]] = {}
        for number in np.unique(epochs).tolist():
            here = epochs == number
            epoch = self.epoch(number)
            positions = self._positions(slots[here], epoch, windows)
            places = np.searchsorted(epoch.starts, positions, side="right") - 1
            shards[here] = epoch.shards[places]
            members[here] = positions - epoch.starts[places]
        self._windows = windows
        return epochs, shards, members

    def epoch(self, number: int) -> _Epoch:
        """What all slots of an epoch share."""
        if number not in self._epochs:
            shards = permutation(self._seed, Purpose.SHARD_ORDER, self._name + number, len(self._counts))
            counts = self._counts[shards]
            lanes = np.arange(self._share.lanes, dtype=np.int64)
            begin, end = (
                self._share.turns(lanes, np.full_like(lanes, self._share.slot(each * self.samples)))
                for each in (number, number + 1)
            )
            lengths = end - begin
            made = _Epoch(shards, np.cumsum(counts) - counts, np.cumsum(lengths) - lengths, lengths, begin)
            self._epochs = {n: self._epochs[n] for n in sorted(self._epochs)[-1:]} | {number: made}
        return self._epochs[number]

    def _positions(self, slots: Slots, epoch: _Epoch, windows: dict[int, NDArray[np.int64]]) -> Slots:
        """Each slot's place in its epoch's line of samples; the windows they lie in are added to those given.

        A window is named by its lane and the lane's first turn in it.
        """
        lanes = slots % self._share.lanes
        turns = self._share.turns(lanes, slots) - epoch.turns[lanes]
        firsts = turns // self._window * self._window
        names = self._name + (epoch.turns[lanes] + firsts) * self._share.lanes + lanes
        lengths = np.minimum(self._window, epoch.lane_lengths[lanes] - firsts)
        _, one_of_each, which = np.unique(names, return_index=True, return_inverse=True)
        orders: list[NDArray[np.int64]] = []
        for name, length in zip(names[one_of_each].tolist(), lengths[one_of_each].tolist(), strict=True):
            order = self._windows.get(name)
            if order is None:
                order = permutation(self._seed, Purpose.LANE_ORDER, name, length)
            windows[name] = order
            orders.append(order)
        each = lengths[one_of_each]
        shuffled = np.concatenate(orders)[(np.cumsum(each) - each)[which] + turns - firsts]
        return epoch.lane_starts[lanes] + firsts + shuffled


def owned_lanes(lanes: int, rank: int, ranks: int) -> range:
    """The lanes that a rank reads: neighbours, so that they lie in as few shards as possible.

    Raises:
        UserError: The ranks cannot share the lanes evenly.
    """
    if lanes % ranks:
        raise UserError(
            f"a global batch of {lanes} cannot be shared by {ranks} ranks; make data.global_batch_size a "
            f"multiple of the ranks."
        )
    each = lanes // ranks
    return range(rank * each, (rank + 1) * each)
