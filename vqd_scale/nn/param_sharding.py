"""Where the weights of a network are while it is built."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)


class ParamSharding:
    """Weights stay where they are made, whole.

    Training overrides it to cut them among the ranks as they are made, for networks that no rank can hold:
    whole at a time is then one part, or the few weights that somebody asks for.
    """

    def placed(self, part: Part) -> Part:
        """Called with each part of a network as soon as it is constructed."""
        return part

    def whole(self, weights: Iterable[Tensor]) -> AbstractContextManager[object]:
        """Within it these weights can be read and written, with the same values on every rank."""
        return nullcontext()


HERE = ParamSharding()
"""The only placement that inference, and training on one rank, needs."""
