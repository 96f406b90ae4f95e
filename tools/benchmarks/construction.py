"""The host memory that one of many ranks needs to build a network, cut as it is made and whole.

One process stands for rank 0 of a larger world: its process group answers every message without sending it.
So what a rank of sixteen holds is measured where sixteen could not run. What the others would send is not
there, but each rank draws the same first weights anyway, and its own share of them is right.
"""

import os
import time
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as distributed
from benchmarks.measuring import extra_peak, in_fresh_process, resident
from torch import Tensor, nn

from vqd_scale.core.progress import progress
from vqd_scale.core.world import World
from vqd_scale.nn.config import DenoiserConfig
from vqd_scale.nn.denoiser import Block, Denoiser
from vqd_scale.nn.param_sharding import NO_SHARDING, ParamSharding, sharded
from vqd_scale.nn.sizes import SIZES, SizeName
from vqd_scale.training.config import AdamWConfig, EMAConfig, EngineConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.engine import Engine, build_param_sharding

_RANKS = 16
_STEPS = 100


def benchmark_construction(
    rounds: int, compared: SizeName = "B", measured: SizeName = "3B", precision: str = "bf16"
) -> dict[str, Any]:
    """Measure seconds and memory of building a network sharded over 16 ranks, and unsharded.

    Args:
        rounds: Number of builds per side, in turn, in fresh processes; medians are reported.
        compared: Size that is built sharded and unsharded.
        measured: Size that is only built sharded, with its engine and EMA.
        precision: Compute precision of the network.

    Raises:
        AssertionError: The weights of the sharded and the unsharded network differ.
    """
    # Without it glibc keeps the memory of each full weight, because its partition lies inside. This cannot
    # happen with partitions in GPU memory.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    in_fresh_process(partial(_compare, precision))
    cut: list[dict[str, float]] = []
    unsharded: list[dict[str, float]] = []
    for _ in progress(range(rounds), "construction", rounds):
        cut.append(in_fresh_process(partial(_built, compared, precision, is_cut=True)))
        unsharded.append(in_fresh_process(partial(_built, compared, precision, is_cut=False)))
    package, alternative = (
        {key: median(row[key] for row in rows) for key in rows[0]} for rows in (cut, unsharded)
    )
    return {
        "ours": package["seconds"],
        "alternative": alternative["seconds"],
        "ratio": alternative["seconds"] / package["seconds"],
        "memory_ratio": package["peak_megabytes"] / alternative["peak_megabytes"],
        "ranks": _RANKS,
        "precision": precision,
        f"{compared}_cut": package,
        f"{compared}_whole": alternative,
        f"{measured}_cut": in_fresh_process(partial(_built, measured, precision, is_cut=True, trains=True)),
    }


def _join(precision: str) -> tuple[World, EngineConfig]:
    # Not public, so it is imported only where it is used; it comes with torch.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(_RANKS))
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=_RANKS)
    torch.set_num_threads(1)
    config = EngineConfig.model_validate({"precision": precision, "param_persistence_threshold": 0})
    return World(0, _RANKS, torch.device("cpu")), config


def _denoiser(size: SizeName, sharding: ParamSharding) -> Denoiser:
    torch.manual_seed(0)
    with sharded(sharding):
        return Denoiser(DenoiserConfig(size=size), SIZES[size].codes, SIZES[size].grid, _STEPS)


def _built(size: SizeName, precision: str, *, is_cut: bool, trains: bool = False) -> dict[str, float]:
    """Return megabytes above the process's memory before the build, and seconds."""
    world, config = _join(precision)
    sharding = build_param_sharding(config, world) if is_cut else NO_SHARDING
    # Libraries that the first partition and the first initial weights load are no part of the network.
    references: list[Any] = [sharding.shard(nn.Linear(2, 2))]
    before, began = resident(), time.perf_counter()
    peak = extra_peak(lambda: references.append(_denoiser(size, sharding)))
    row = {
        "seconds": time.perf_counter() - began,
        "peak_megabytes": peak / 1e6,
        "held_megabytes": (resident() - before) / 1e6,
    }
    if trains:
        references.append(Engine(references[1], config, AdamWConfig(), _RANKS, world, (Block,)))
        tensors = references[2].partition.tensors()
        for flat in [flat for kind in AdamWConfig.moments for flat in tensors[kind]]:
            # Zeros take no memory before the first write.
            flat.fill_(1.0)
        references.append(EMA(EMAConfig(), references[2].partition))
        row["ready_to_train_megabytes"] = (resident() - before) / 1e6
    return row


def _compare(precision: str) -> None:
    world, config = _join(precision)
    cut, unsharded = _denoiser("S", build_param_sharding(config, world)), _denoiser("S", NO_SHARDING)
    for (name, sharded_weight), (_, full_weight) in zip(
        cut.named_parameters(), unsharded.named_parameters(), strict=True
    ):
        share: Tensor = sharded_weight.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        expected = full_weight.detach().flatten()[: share.numel()].to(share.dtype)
        torch.testing.assert_close(share[: len(expected)], expected, rtol=0, atol=0, msg=name)
