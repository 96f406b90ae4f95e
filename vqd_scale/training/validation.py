"""Validation with fixed samples, timesteps and noise, comparable across runs and seeds."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Generic

import torch
from pydantic import PositiveInt
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import Batch, BatchType
from vqd_scale.data.loading.stream import Stream, StreamConfig
from vqd_scale.training.tasks.base import Forward, Task

_SEED = 0
"""Seed of the sample order, independent of the run's seed: all seeds use the same validation samples."""


class ValidationConfig(Config):
    """Validation set and evaluation period."""

    path: Path
    """Validation shards, of the same kind as the training shards but with other samples."""
    every_images: PositiveInt = 1_000_000
    """Images between two evaluations; the last evaluation is at the end of the run."""
    samples: PositiveInt = 2048
    """Maximum number of validation samples, taken in a fixed order."""
    batch_size: PositiveInt = 64
    """Batch size per rank."""


class ValidationSet(Generic[BatchType]):
    """Validation samples, read once and cached in memory.

    Rank i of n evaluates samples i, i + n, i + 2n, … All ranks run the same number of forward passes, because
    each one is collective under ZeRO-3. Sums are all-reduced in float64, so the metrics are the same for any
    number of ranks.

    Args:
        config: Validation set.
        task: Task that computes the metrics.
        world: This process's rank and device.
        quarantine: Report file for bad samples.
    """

    def __init__(
        self, config: ValidationConfig, task: Task[BatchType], world: World, quarantine: Path
    ) -> None:
        self._task = task
        self._world = world
        lanes = config.batch_size
        stream = Stream(
            StreamConfig(path=config.path, global_batch_size=lanes, shuffle_window=1, max_bad_fraction=1.0),
            task.samples(),
            seed=_SEED,
            rank=0,
            ranks=1,
            cursor=0,
            quarantine=quarantine,
        )
        count = min(config.samples, stream.items)
        share = -(-count // world.size)
        mine = torch.arange(share) * world.size + world.rank
        with closing(iter(stream)) as batches:
            samples = Batch.cat([next(batches) for _ in range(-(-count // lanes))])
        # If the samples do not divide evenly over the ranks, a rank pads with its first sample, masked out.
        counted = mine < count
        rows = torch.where(counted, mine, mine[0].clamp(max=count - 1))
        samples = samples.select(rows)
        samples = replace(samples, valid=samples.valid & counted)
        self._parts = [samples.select(part) for part in torch.arange(share).split(config.batch_size)]

    @torch.no_grad()
    def measured(self, forward: Forward) -> dict[str, float]:
        """Return the task's metrics as means over all validation samples; collective."""
        sums: dict[str, Tensor] = {}
        for part in self._parts:
            batch = part.to(self._world.device, non_blocking=True)
            for name, value in self._task.validate(forward, batch).items():
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + value.double().cpu()
        names = sorted(sums)
        totals = self._world.sum(torch.stack([sums[name] for name in names]).to(self._world.device)).cpu()
        return {name: float(total / count) for name, (total, count) in zip(names, totals, strict=True)}
