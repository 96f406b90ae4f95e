"""Class-balanced sample order, as a pure function of the slot: all classes are sampled equally often."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int32

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.order.mixture import MixtureShare, Slots
from vqd_scale.data.shards.shard_index import Shard, ShardSet
from vqd_scale.data.shards.shard_table import read_table

_READ_AT_ONCE = 16


class BalancedOrder:
    """Class-balanced order of one dataset: each round contains every class once, in a random order.

    Each class has its own epochs: its samples are shuffled, and each is used exactly once per epoch. Reads
    are at random offsets, not sequential.

    Args:
        classes: Class of each sample, in index order; any integers.
        counts: Samples in each shard.
        share: Slots of the dataset.
        seed: Seed of the run.
        name: First random-stream id of the dataset, added to round and epoch numbers; see
            `vqd_scale.data.order.plan.names_of`.
    """

    def __init__(
        self, classes: NDArray[np.int32], counts: Sequence[int], share: MixtureShare, seed: int, name: int = 0
    ) -> None:
        labels, numbers = np.unique(classes, return_inverse=True)
        self._classes = len(labels)
        self._members = np.argsort(numbers, kind="stable")
        self._sizes = np.bincount(numbers)
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._shards = np.cumsum(counts) - np.asarray(counts)
        self._share = share
        self._seed = seed
        self._name = name
        # Cache of a pure function: each class's current order.
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def locate(self, slots: Slots) -> tuple[Slots, Slots, Slots]:
        """Implement `vqd_scale.data.order.plan.Order.locate`; an epoch has one slot per sample."""
        numbers = self._share.before(slots)
        rounds, turns = np.divmod(numbers, self._classes)
        classes = np.empty_like(slots)
        for number in np.unique(rounds).tolist():
            in_round = rounds == number
            order = permutation(self._seed, Purpose.CLASS_ORDER, self._name + number, self._classes)
            classes[in_round] = order[turns[in_round]]
        epochs, positions = np.divmod(rounds, self._sizes[classes])
        columns = (classes.tolist(), epochs.tolist(), positions.tolist())
        members = [
            self._order(number, epoch).item(position)
            for number, epoch, position in zip(*columns, strict=True)
        ]
        samples = self._members[self._begins[classes] + np.array(members, np.int64)]
        shards = np.searchsorted(self._shards, samples, side="right") - 1
        return numbers // len(self._members), shards, samples - self._shards[shards]

    def _order(self, number: int, epoch: int) -> NDArray[np.int64]:
        """Return the order of a class's samples in one of its epochs, cached."""
        cached = self._orders.get(number)
        if cached is None or cached[0] != epoch:
            name = self._name + epoch * self._classes + number
            cached = epoch, permutation(self._seed, Purpose.CLASS_MEMBERS, name, int(self._sizes[number]))
            self._orders[number] = cached
        return cached[1]


def classes_of(shards: ShardSet) -> NDArray[np.int32]:
    """Return the class of each sample of a dataset, in index order; reads every shard's table.

    Raises:
        UserError: A sample has no class.
    """

    def read_classes(shard: Shard) -> Int32[NDArray[np.int32], " count"]:
        classes = read_table(shard).columns.get("class", np.full(shard.count, np.nan))
        if np.isnan(classes).any():
            raise UserError(
                f"{shard.path}: holds samples without a class, so that classes cannot be balanced; their "
                "'json' must name their 'class' when the set is made or indexed."
            )
        return classes.astype(np.int32)

    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        return np.concatenate(list(pool.map(read_classes, shards.shards)))
