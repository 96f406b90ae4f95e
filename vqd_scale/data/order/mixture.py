"""Which slots are whose when several sets are mixed, as a pure function of the slot.

Lay the first k batches out lane by lane, k slots to a lane: one line of ``k * lanes`` slots. The first set
gets as many from its beginning as it is due, the second one the next, and so on, in whole slots. So over any
number of batches no set is a whole slot away from its due, almost every lane belongs to one set for ever and
is read sequentially, and at most one lane between two neighbours changes hands, evenly over time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import lcm

import numpy as np
from jaxtyping import Bool, Int64

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError

Slots = Int64[NDArray[np.int64], " slots"]

_LARGEST_TOTAL = 10_000_000
"""What weights as whole numbers may add up to: slots, fewer than 10**11, times this is exact in 64 bits."""


@dataclass(frozen=True)
class MixtureShare:
    """The slots of one set, those from ``begin / total`` to ``end / total`` of the line.

    Attributes:
        begin: Weights of the sets before it.
        end: The same and its own; at least one slot of a batch, so that a batch's slots are in order.
        total: All weights.
        lanes: Lanes of a batch.
    """

    begin: int
    end: int
    total: int
    lanes: int

    def owns(self, slots: Slots) -> Bool[NDArray[np.bool_], " slots"]:
        """Which slots are the set's."""
        return self._owns(slots // self.lanes, slots % self.lanes)

    def before(self, slots: Slots) -> Slots:
        """How many of the set's slots come before each slot: of its own, each one's number."""
        batches = slots // self.lanes
        low, high = self._lane(self.begin, batches), self._lane(self.end, batches)
        within = np.clip(slots % self.lanes - low, 0, high - low)
        return self._cells(self.end, batches) - self._cells(self.begin, batches) + within

    def slot(self, number: int) -> int:
        """The slot of the set's sample ``number``, counted from 0: `before` the other way round."""
        near = number * self.total // ((self.end - self.begin) * self.lanes)
        # In whole batches the set is less than a slot from its due, and it is due one in each.
        batches = np.arange(max(0, near - 2), near + 2, dtype=np.int64)
        counts = self._cells(self.end, batches) - self._cells(self.begin, batches)
        last = int(np.searchsorted(counts, number, side="right")) - 1
        batch = batches[last : last + 1]
        return int(batch[0] * self.lanes + self._lane(self.begin, batch)[0] + number - counts[last])

    def turns(self, lanes: Slots, slots: Slots) -> Slots:
        """How many of the set's slots of each lane come before each slot."""
        batches = slots // self.lanes
        whole = self._turns(self.end, lanes, batches) - self._turns(self.begin, lanes, batches)
        return whole + (self._owns(batches, lanes) & (lanes < slots % self.lanes))

    def _owns(self, batches: Slots, lanes: Slots) -> Bool[NDArray[np.bool_], " slots"]:
        return (self._lane(self.begin, batches) <= lanes) & (lanes < self._lane(self.end, batches))

    def _cells(self, edge: int, batches: Slots) -> Slots:
        """How much of the line of so many batches lies before an edge."""
        return batches * (self.lanes * edge) // self.total

    def _lane(self, edge: int, batches: Slots) -> Slots:
        """In which lane of each batch an edge lies."""
        return self._cells(edge, batches + 1) - self._cells(edge, batches)

    def _turns(self, edge: int, lanes: Slots, batches: Slots) -> Slots:
        """How much of each lane's part of the line lies before an edge."""
        return np.clip(self._cells(edge, batches) - lanes * batches, 0, batches)


def shares(weights: Sequence[float], lanes: int) -> list[MixtureShare]:
    """The slots of each of some sets.

    Args:
        weights: In which proportions, each above 0; as decimals they are taken exactly.
        lanes: Lanes of a batch.

    Raises:
        UserError: Weights have too many digits, or give a set less than one sample of a batch.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    edges = list(accumulate((int(weight * scale) for weight in exact), initial=0))
    total = edges[-1]
    if total > _LARGEST_TOTAL:
        raise UserError(
            f"the weights {', '.join(map(str, weights))} have too many digits to be kept exactly; round them."
        )
    for weight, (begin, end) in zip(weights, pairwise(edges), strict=True):
        if (end - begin) * lanes < total:
            raise UserError(
                f"a weight of {weight} is less than one sample in a batch of {lanes}; raise it, or "
                "data.global_batch_size."
            )
    return [MixtureShare(begin, end, total, lanes) for begin, end in pairwise(edges)]
