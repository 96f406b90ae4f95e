"""Sharding of a network's weights during construction, set from outside by `sharded`."""

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor, nn

Part = TypeVar("Part", bound=nn.Module)


class ParamSharding:
    """Default: weights are not sharded and stay on the device of their construction.

    Training overrides this class to shard weights across ranks during construction, for networks too large
    for one rank. At any time only one part, or the weights passed to `gather`, are gathered.
    """

    def shard(self, part: Part) -> Part:
        """Shard one part of a network; called right after the part's construction."""
        return part

    def gather(self, weights: Iterable[Tensor]) -> AbstractContextManager[object]:
        """Return a context that gathers weights for reading and writing; values are equal on all ranks."""
        return nullcontext()


NO_SHARDING = ParamSharding()
"""Default for inference and for training on one rank."""

_ACTIVE: ContextVar[ParamSharding] = ContextVar("active_sharding", default=NO_SHARDING)


@contextmanager
def sharded(sharding: ParamSharding) -> Generator[None]:
    """Shard the networks that are built or initialized within the context."""
    token = _ACTIVE.set(sharding)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shard(part: Part) -> Part:
    """Apply `ParamSharding.shard` of the context."""
    return _ACTIVE.get().shard(part)


def gather(weights: Iterable[Tensor]) -> AbstractContextManager[object]:
    """Apply `ParamSharding.gather` of the context."""
    return _ACTIVE.get().gather(weights)
