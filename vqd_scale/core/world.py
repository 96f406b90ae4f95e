"""Distributed setup: rank and device of this process, and the collective operations between ranks."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as distributed
from torch import Tensor
from torch._C._distributed_c10d import HashStore, TCPStore

from vqd_scale.core.environment import is_srun_task, place_among_ranks
from vqd_scale.core.errors import FirstRankError, UserError
from vqd_scale.core.watchdog import is_watched, phase, share_progress, watched

_RENDEZVOUS_SECONDS = 1800.0
"""Longest rendezvous of a process without a watchdog."""
_TIMEOUT = timedelta(hours=1)
"""Timeout of a collective operation without a watchdog."""
_WATCHED_TIMEOUT = timedelta(days=7)
"""Timeout of a collective operation with one: a rank may wait long for the progress of another."""
_BEATS = "vqd_scale/beats"


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process.

    Attributes:
        rank: Index of this process, 0 to size - 1.
        size: Number of ranks.
        device: Device on which this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes, prints and decides."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the all-reduced sum of a tensor (a new tensor; bit-identical on every rank)."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank (all-reduce)."""
        flags = torch.tensor([float(flag)], device=self.device)
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags.item())

    def concatenated(self, tensor: Tensor) -> Tensor:
        """All-gather tensors of equal shape and concatenate them along dimension 0 in rank order."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gathered(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """All-gather small dictionaries of plain values, in rank order."""
        values: list[dict[str, Any] | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return cast(list[dict[str, Any]], values)

    def barrier(self) -> None:
        """Wait for all ranks."""
        distributed.barrier()

    def on_first_rank(self, action: Callable[[], object]) -> None:
        """Run a function on rank 0, such as writing a file, while the other ranks wait.

        Raises:
            UserError: The function raised one on rank 0; it is raised on every rank.
        """
        mistake: UserError | None = None
        if self.is_first:
            try:
                action()
            except UserError as error:
                mistake = error
        message = self.gathered({"mistake": None if mistake is None else str(mistake)})[0]["mistake"]
        if message is not None:
            raise mistake or FirstRankError(message)


def join_world() -> World:
    """Initialize the process group (torchrun, srun or a single process); gloo on CPU, NCCL on GPU.

    Raises:
        UserError: srun started several ranks, but ``MASTER_ADDR`` is not set; or there are fewer GPUs than
            ranks.
        ValueError: Another launcher did not set the rendezvous; torch names the missing variable.
    """
    rank, size, local_rank = place_among_ranks()
    if size > 1 and "MASTER_ADDR" not in os.environ and is_srun_task():
        raise UserError(
            "MASTER_ADDR is not set, so that the ranks cannot meet: `source slurm/env.sh` in the shell that "
            "calls srun."
        )
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(name, str(value))
    device = _device(local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            timeout = _WATCHED_TIMEOUT if is_watched() else _TIMEOUT
            with watched(_RENDEZVOUS_SECONDS), phase(f"rendezvous of {size} ranks at {address}:{port}"):
                distributed.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
                # A connection of its own: the threads of one would wait for each other.
                store = TCPStore(address, int(port), is_master=False, wait_for_workers=False)
                share_progress(lambda amount: store.add(_BEATS, amount))
    return World(rank, size, device)


def _device(local_rank: int) -> torch.device:
    """Select this rank's GPU; under ``--gpus-per-task`` a rank sees only its own."""
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(
            f"rank {local_rank} of this node has no GPU, as only {count} are visible; start one rank per GPU."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def is_first_to(action: str) -> bool:
    """Return True on the first rank that asks for an action, and where the first rank has left."""
    try:
        store = distributed.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        return store.add(f"vqd_scale/first to {action}", 1) == 1
    except RuntimeError:
        return True


def leave_world() -> None:
    """Destroy the process group; `join_world` may be called again afterwards."""
    if not distributed.is_initialized():
        return
    # DeepSpeed must destroy the groups itself: it would otherwise reuse its stale groups in the next world.
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        distributed.destroy_process_group()
