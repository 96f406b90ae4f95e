"""Assignment of slots to datasets in a weighted mixture, as a pure function of the slot.

After k batches, each lane has had k slots. Laid end to end, lane 0 first, they form a line of ``k * lanes``
cells. Dataset i owns the cells between its cumulative weight fractions, rounded down to whole cells. In batch
k, dataset i gets one slot per cell that the step from k to k + 1 batches adds.

Over any number of batches, a dataset is less than one slot away from its exact share. Almost every lane
belongs to one dataset permanently and is read sequentially. At most one lane between two neighboring datasets
alternates, evenly over time.

Example: datasets A and B, weights 5 and 3, 4 lanes. After k batches, A owns ``floor(4 k * 5 / 8)`` cells: 0,
2 and 5 for k = 0, 1, 2. So A gets 2 slots in batch 0 and 3 slots in batch 1::

    slot     0 1 2 3   4 5 6 7
    batch    0 0 0 0   1 1 1 1
    lane     0 1 2 3   0 1 2 3
    dataset  A A B B   A A A B    lane 2 alternates
    number   0 1 0 1   2 3 4 2    `MixtureShare.before`
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
"""Maximum sum of the integer weights: times a slot number below 10**11, it is exact in 64 bits."""


@dataclass(frozen=True)
class MixtureShare:
    """Slots of one dataset: the cells from ``begin / total`` to ``end / total`` of the line.

    Attributes:
        begin: Sum of the integer weights of all preceding datasets.
        end: ``begin`` plus the dataset's own weight. The difference is at least one slot per batch, so that
            the slots of a batch are in order.
        total: Sum of all integer weights.
        lanes: Lanes per batch, equal to the global batch size.
    """

    begin: int
    end: int
    total: int
    lanes: int

    def owns(self, slots: Slots) -> Bool[NDArray[np.bool_], " slots"]:
        """Return a mask of the slots that belong to the dataset."""
        return self._owns(slots // self.lanes, slots % self.lanes)

    def before(self, slots: Slots) -> Slots:
        """Count the dataset's slots before each slot; for an own slot, this is its number in the dataset."""
        batches = slots // self.lanes
        low, high = self._lane(self.begin, batches), self._lane(self.end, batches)
        within = np.clip(slots % self.lanes - low, 0, high - low)
        return self._cells(self.end, batches) - self._cells(self.begin, batches) + within

    def slot(self, number: int) -> int:
        """Return the global slot of the dataset's slot ``number`` (from 0); the inverse of `before`."""
        estimate = number * self.total // ((self.end - self.begin) * self.lanes)
        # Over whole batches the dataset is less than one slot from its exact share (>= 1 slot per batch).
        batches = np.arange(max(0, estimate - 2), estimate + 2, dtype=np.int64)
        counts = self._cells(self.end, batches) - self._cells(self.begin, batches)
        last = int(np.searchsorted(counts, number, side="right")) - 1
        batch = batches[last : last + 1]
        return int(batch[0] * self.lanes + self._lane(self.begin, batch)[0] + number - counts[last])

    def turns(self, lanes: Slots, slots: Slots) -> Slots:
        """Count the dataset's slots in each lane before each slot."""
        batches = slots // self.lanes
        before_batch = self._turns(self.end, lanes, batches) - self._turns(self.begin, lanes, batches)
        return before_batch + (self._owns(batches, lanes) & (lanes < slots % self.lanes))

    def _owns(self, batches: Slots, lanes: Slots) -> Bool[NDArray[np.bool_], " slots"]:
        return (self._lane(self.begin, batches) <= lanes) & (lanes < self._lane(self.end, batches))

    def _cells(self, edge: int, batches: Slots) -> Slots:
        """Count the cells of a line of ``batches`` batches before an edge."""
        return batches * (self.lanes * edge) // self.total

    def _lane(self, edge: int, batches: Slots) -> Slots:
        """Return the lane at which an edge lies in each batch."""
        return self._cells(edge, batches + 1) - self._cells(edge, batches)

    def _turns(self, edge: int, lanes: Slots, batches: Slots) -> Slots:
        """Count the cells of each lane's part of the line before an edge."""
        return np.clip(self._cells(edge, batches) - lanes * batches, 0, batches)


def shares(weights: Sequence[float], lanes: int) -> list[MixtureShare]:
    """Compute the slots of each dataset of a mixture.

    Args:
        weights: Relative weight of each dataset, above 0. Decimal values are taken exactly.
        lanes: Lanes per batch.

    Raises:
        UserError: Weights have too many digits, or give a dataset less than one sample per batch.
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
