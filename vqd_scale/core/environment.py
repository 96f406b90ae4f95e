"""Ranks and processor of this process, from its environment; needs no torch."""

import functools
import os
from pathlib import Path

OWN_LOG = "VQD_RANK_LOG"
"""Environment variable that is set where each rank has a log of its own."""

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""First of Slurm's special step IDs, which are not srun steps: a batch script, an interactive shell."""


def place_among_ranks() -> tuple[int, int, int]:
    """Return rank, world size and local rank from the launcher's environment variables."""
    return (
        _variable("RANK", "SLURM_PROCID", 0),
        _variable("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1),
        _variable("LOCAL_RANK", "SLURM_LOCALID", 0),
    )


def is_srun_task() -> bool:
    """Return whether srun started this process, as opposed to a batch script or an interactive shell."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def computes_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware, several times faster than without."""
    return not processor_features().isdisjoint(("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


@functools.cache
def processor_features() -> frozenset[str]:
    """Return the CPU feature flags by their Linux names, which torch 2.10 does not expose."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(features.split())
    return frozenset()


def _variable(torchrun: str, slurm: str, default: int) -> int:
    return int(os.environ.get(torchrun, os.environ.get(slurm, default) if is_srun_task() else default))
