"""Ranks as threads of the test: collective operations without processes."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vqd_scale.core.world import World
from vqd_scale.training.partition import Partition

Result = TypeVar("Result")

_GENERATOR = threading.Lock()


@contextmanager
def own_seed(seed: int) -> Generator[None]:
    """Seed torch's generator, which all threads share, and hold it during the block."""
    with _GENERATOR:
        torch.manual_seed(seed)
        yield


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadWorld(World):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size, torch.device("cpu"))
        object.__setattr__(self, "_meeting", meeting)

    def _exchange(self, value: Any) -> list[Any]:
        meeting: _Meeting = object.__getattribute__(self, "_meeting")
        return meeting.exchange(self.rank, value)

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor.clone())).sum(dim=0)

    def any(self, flag: bool) -> bool:
        return any(self._exchange(flag))

    def concatenated(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor))

    def gathered(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        return self._exchange(value)

    def barrier(self) -> None:
        self._exchange(None)


def on_ranks(size: int, action: Callable[[World], Result]) -> list[Result]:
    """Run an action on ``size`` ranks at once; return all results, or raise the first error."""
    meeting = _Meeting(size)

    def run(rank: int) -> Result:
        try:
            return action(ThreadWorld(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


class _Address:
    def __init__(self, start: int, numel: int) -> None:
        self.start, self.numel = start, numel


class _Mapping:
    def __init__(self, start: int, numel: int, offset: int) -> None:
        self.param_group_index = 0
        self.lp_fragment_address = _Address(start, numel)
        self.hp_fragment_address = _Address(offset, numel)


class _RowOptimizer:
    """The attributes of DeepSpeed's optimizer that the partition reads in stages 1 and 2."""

    def __init__(self, module: nn.Module, rank: int, ranks: int) -> None:
        row = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        length = -(-len(row) // ranks)
        first, last = rank * length, min(len(row), (rank + 1) * length)
        self.single_partition_of_fp32_groups = [row[first:last].clone().requires_grad_()]
        self.optimizer = torch.optim.AdamW(self.single_partition_of_fp32_groups)
        start = 0
        for parameter in module.parameters():
            end = start + parameter.numel()
            begin, stop = max(start, first), min(end, last)
            mapping = _Mapping(begin - start, stop - begin, begin - first) if begin < stop else None
            parameter._hp_mapping = mapping  # pyright: ignore[reportAttributeAccessIssue]
            start = end

    def update_lp_params(self) -> None:
        """Ignore the network's own weights, which these tests do not use."""


def partition_of(module: nn.Module, world: World) -> Partition:
    """Return this rank's partition of a module in the layout of stages 1 and 2, without DeepSpeed."""
    return Partition(
        _RowOptimizer(module, world.rank, world.size), module, world.rank, ("exp_avg", "exp_avg_sq")
    )
