"""Who reads what, as a pure function of (seed, slot): the order of the data has no state.

The shards of an epoch are put in a random order and their samples laid end to end. This line is cut into
``lanes`` pieces; global batch k takes the next sample of every lane, and each lane is read sequentially,
shuffled within a window. Epochs follow each other without a gap: global slot g is in epoch ``g // samples``,
in lane ``g % lanes`` and in batch ``g // lanes``, so a batch may hold the end of one epoch and the start of
the next, and the ``samples`` slots of an epoch hold every sample exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, permutation

Slots = Int64[NDArray[np.int64], " slots"]


@dataclass(frozen=True)
class Places:
    """Where the samples of some slots lie: row i is slot i's epoch, shard (in the index) and place in it."""

    epochs: Slots
    shards: Slots
    members: Slots


class Plan:
    """The order of a set of shards.

    Args:
        counts: Samples in each shard, in the index's order.
        lanes: Into how many pieces an epoch is cut; also the global batch.
        shuffle_window: Over how many neighbours of its lane a sample may be moved.
        seed: The run's seed.

    Raises:
        UserError: There is no sample.
    """

    def __init__(self, counts: Sequence[int], lanes: int, shuffle_window: int, seed: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.lanes = lanes
        self._window = shuffle_window
        self._seed = seed
        # Caches of what is a pure function anyway: two epochs' orders, and each lane's present window.
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[int, tuple[int, NDArray[np.int64]]] = {}
        if self.samples == 0:
            raise UserError("a set of shards without samples cannot be read; make it again.")

    def locate(self, slots: Slots) -> Places:
        """The sample of each global slot, int64 >= 0 in any order."""
        epochs = slots // self.samples
        positions = self._positions(slots, epochs)
        shards, members = np.empty_like(slots), np.empty_like(slots)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order, starts = self._epoch(epoch)
            turns = np.searchsorted(starts, positions[here], side="right") - 1
            shards[here] = order[turns]
            members[here] = positions[here] - starts[turns]
        return Places(epochs, shards, members)

    def _positions(self, slots: Slots, epochs: Slots) -> Slots:
        """Each slot's place in its epoch's line of samples."""
        lanes = slots % self.lanes
        begin, end = epochs * self.samples, (epochs + 1) * self.samples
        lane_starts = self._slots_left_of(end, lanes) - self._slots_left_of(begin, lanes)
        first = self._slots_in_lane(begin, lanes)
        lengths = self._slots_in_lane(end, lanes) - first
        turns = slots // self.lanes - first
        windows = turns // self._window * self._window
        shuffled = np.array(
            [
                self._shuffled(lane, window_slot, length)[turn]
                for lane, window_slot, length, turn in zip(
                    lanes.tolist(),
                    ((first + windows) * self.lanes + lanes).tolist(),
                    np.minimum(self._window, lengths - windows).tolist(),
                    (turns - windows).tolist(),
                    strict=True,
                )
            ],
            dtype=np.int64,
        )
        return lane_starts + windows + shuffled

    def _slots_in_lane(self, before: Slots, lanes: Slots) -> Slots:
        """How many slots g < ``before`` have g % lanes == lane."""
        return (before - lanes + self.lanes - 1) // self.lanes

    def _slots_left_of(self, before: Slots, lanes: Slots) -> Slots:
        """How many slots g < ``before`` have g % lanes < lane."""
        return before // self.lanes * lanes + np.minimum(before % self.lanes, lanes)

    def _shuffled(self, lane: int, first_slot: int, length: int) -> NDArray[np.int64]:
        """The order within a lane's window, which is named by its first slot: no two windows share one."""
        cached = self._windows.get(lane)
        if cached is None or cached[0] != first_slot:
            cached = first_slot, permutation(self._seed, Purpose.LANE_ORDER, first_slot, length)
            self._windows[lane] = cached
        return cached[1]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards' order in an epoch, and where in its line each of them begins."""
        if epoch not in self._epochs:
            order = permutation(self._seed, Purpose.SHARD_ORDER, epoch, len(self.counts))
            starts = np.cumsum(self.counts[order]) - self.counts[order]
            latest = sorted(self._epochs)[-1:]
            self._epochs = {kept: self._epochs[kept] for kept in latest} | {epoch: (order, starts)}
        return self._epochs[epoch]


def owned_lanes(lanes: int, rank: int, ranks: int) -> range:
    """The lanes that a rank reads: neighbours, so that they lie in as few shards as possible.

    Raises:
        UserError: The ranks cannot share the lanes evenly.
    """
    if lanes % ranks:
        raise UserError(
            f"{lanes} lanes cannot be shared by {ranks} ranks; make lanes a multiple of the ranks."
        )
    each = lanes // ranks
    return range(rank * each, (rank + 1) * each)
