"""Who this process is among the ranks of a run, and the few things that ranks say to each other."""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as distributed
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from vqd_scale.core.errors import FirstRankError, UserError

_PATIENCE = timedelta(hours=1)
"""How long a message between ranks may take before the library gives up: longer than any watchdog of ours,
which says where each rank is."""

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""From here on Slurm numbers the steps that are no srun's: a job's script, an interactive shell."""


@dataclass(frozen=True)
class World:
    """This process's place in the run.

    Attributes:
        rank: 0 to size - 1.
        size: Number of ranks.
        device: Where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, prints and decides."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks (a new tensor; equal bits on every rank)."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        flags = torch.tensor([float(flag)], device=self.device)
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags.item())

    def concatenated(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks along dimension 0, in the order of ranks; all must have one shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gathered(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Small plain values of all ranks, in the order of ranks."""
        values: list[dict[str, Any] | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return cast(list[dict[str, Any]], values)

    def barrier(self) -> None:
        """Wait for all ranks."""
        distributed.barrier()

    def on_first_rank(self, act: Callable[[], object]) -> None:
        """Let the first rank do something for all, such as write a file, while the others wait for it.

        Raises:
            UserError: It could not; every rank learns why and leaves.
        """
        mistake: UserError | None = None
        if self.is_first:
            try:
                act()
            except UserError as error:
                mistake = error
        told = self.gathered({"mistake": None if mistake is None else str(mistake)})[0]["mistake"]
        if told is not None:
            raise mistake or FirstRankError(told)


def join_world() -> World:
    """Join the ranks that the launcher (torchrun, srun, or nobody) started; gloo on CPU, NCCL on GPU.

    Raises:
        UserError: srun started several ranks and nobody said where they meet.
        ValueError: Another launcher did not say so; torch says which variable is missing.
    """
    rank, size, local_rank = place_among_ranks()
    if size > 1 and "MASTER_ADDR" not in os.environ and _is_srun_task():
        raise UserError(
            "MASTER_ADDR is not set, so that the ranks cannot meet: `source slurm/env.sh` in the shell that "
            "calls srun."
        )
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(name, str(value))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_PATIENCE)
    return World(rank, size, device)


def place_among_ranks() -> tuple[int, int, int]:
    """This process's rank, the number of ranks, and its rank on this machine, as its launcher says them."""
    return (
        _from_environment("RANK", "SLURM_PROCID", 0),
        _from_environment("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1),
        _from_environment("LOCAL_RANK", "SLURM_LOCALID", 0),
    )


def leave_world() -> None:
    """Say goodbye to the other ranks; a world can be joined anew afterwards."""
    if not distributed.is_initialized():
        return
    # DeepSpeed keeps groups of this world for the next one, where they are none, unless it is what ends them.
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        distributed.destroy_process_group()


def computes_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 in hardware, several times faster than else."""
    return not processor_features().isdisjoint(("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


@functools.cache
def processor_features() -> frozenset[str]:
    """What this machine's processor can do, by Linux's names; torch 2.10 does not say it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(features.split())
    return frozenset()


def _from_environment(torchrun: str, slurm: str, alone: int) -> int:
    return int(os.environ.get(torchrun, os.environ.get(slurm, alone) if _is_srun_task() else alone))


def _is_srun_task() -> bool:
    """Whether srun started this process; a job's script and an interactive shell have its other variables."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP
