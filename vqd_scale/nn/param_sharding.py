"""Sharding of a network's weights during construction."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)


class ParamSharding:
    """Default placement: weights are not sharded and stay on the device of their construction.

    Training overrides this class to shard weights across ranks during construction, for networks too large
    for one rank. At any time only one part, or the weights passed to `whole`, are gathered.
    """

    def placed(self, part: Part) -> Part:
        """Place one part of a network; called right after the part's construction."""
        return part

    def whole(self, weights: Iterable[Tensor]) -> AbstractContextManager[object]:
        """Return a context that gathers weights for reading and writing; values are equal on all ranks."""
        return nullcontext()


HERE = ParamSharding()
"""Placement for inference and for training on one rank."""
