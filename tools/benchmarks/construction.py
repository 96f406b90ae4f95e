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
from vqd_scale.nn.denoiser import Block, Denoiser, DenoiserConfig
from vqd_scale.nn.param_sharding import HERE, ParamSharding
from vqd_scale.nn.sizes import SIZES, SizeName
from vqd_scale.training.ema import EMA, EMAConfig
from vqd_scale.training.engine import Engine, EngineConfig, placement
from vqd_scale.training.optim import OptimConfig

_RANKS = 16
_STEPS = 100


def benchmark_construction(
    rounds: int, compared: SizeName = "B", held: SizeName = "3B", precision: str = "bf16"
) -> dict[str, Any]:
    """Seconds and memory of building a network cut among 16 ranks, beside building it whole.

    Args:
        rounds: How often each is built, in turn, in fresh processes; medians count.
        compared: The size that is built both ways.
        held: The size that is only built cut, and taken on to where it would train.
        precision: What the network computes in.

    Raises:
        AssertionError: The cut network's weights are not the whole one's.
    """
    # Without it glibc keeps the room of each part that was whole, because a share lies in its middle; that
    # cannot happen where the shares lie in a GPU's memory.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    in_fresh_process(partial(_compare, precision))
    cut: list[dict[str, float]] = []
    whole: list[dict[str, float]] = []
    for _ in progress(range(rounds), "construction", rounds):
        cut.append(in_fresh_process(partial(_built, compared, precision, is_cut=True)))
        whole.append(in_fresh_process(partial(_built, compared, precision, is_cut=False)))
    ours, alternative = ({key: median(row[key] for row in rows) for key in rows[0]} for rows in (cut, whole))
    return {
        "ours": ours["seconds"],
        "alternative": alternative["seconds"],
        "ratio": alternative["seconds"] / ours["seconds"],
        "memory_ratio": ours["peak_megabytes"] / alternative["peak_megabytes"],
        "ranks": _RANKS,
        "precision": precision,
        f"{compared}_cut": ours,
        f"{compared}_whole": alternative,
        f"{held}_cut": in_fresh_process(partial(_built, held, precision, is_cut=True, trains=True)),
    }


def _join(precision: str) -> tuple[World, EngineConfig]:
    # Not public, and so only asked for where it is used; it comes with torch.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(_RANKS))
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=_RANKS)
    torch.set_num_threads(1)
    config = EngineConfig.model_validate({"precision": precision, "param_persistence_threshold": 0})
    return World(0, _RANKS, torch.device("cpu")), config


def _denoiser(size: SizeName, where: ParamSharding) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig(size=size), SIZES[size].codes, SIZES[size].grid, _STEPS, where)


def _built(size: SizeName, precision: str, *, is_cut: bool, trains: bool = False) -> dict[str, float]:
    """Megabytes above what the process held before it built anything, and seconds."""
    world, config = _join(precision)
    where = placement(config, world) if is_cut else HERE
    # What is loaded at the first cut, and at the first weights drawn, is no part of the network.
    kept: list[Any] = [where.placed(nn.Linear(2, 2))]
    before, began = resident(), time.perf_counter()
    peak = extra_peak(lambda: kept.append(_denoiser(size, where)))
    row = {
        "seconds": time.perf_counter() - began,
        "peak_megabytes": peak / 1e6,
        "held_megabytes": (resident() - before) / 1e6,
    }
    if trains:
        kept.append(Engine(kept[1], config, OptimConfig(), _RANKS, world, (Block,)))
        moments = [kept[2].partition.moments(name) for name in ("exp_avg", "exp_avg_sq")]
        for flat in [flat for flats in moments for flat in flats]:
            # Zeros are not in memory until somebody writes.
            flat.fill_(1.0)
        kept.append(EMA(EMAConfig(), kept[2].partition))
        row["ready_to_train_megabytes"] = (resident() - before) / 1e6
    return row


def _compare(precision: str) -> None:
    world, config = _join(precision)
    cut, whole = _denoiser("S", placement(config, world)), _denoiser("S", HERE)
    for (name, ours), (_, theirs) in zip(cut.named_parameters(), whole.named_parameters(), strict=True):
        share: Tensor = ours.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        expected = theirs.detach().flatten()[: share.numel()].to(share.dtype)
        torch.testing.assert_close(share[: len(expected)], expected, rtol=0, atol=0, msg=name)
