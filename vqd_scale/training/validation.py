"""Validation with fixed samples, timesteps and noise, comparable across runs and seeds."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from vqd_scale.core.watchdog import beat
from vqd_scale.core.world import World
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import Batch, BatchType
from vqd_scale.data.loading.stream import Stream
from vqd_scale.training.config import ValidationConfig
from vqd_scale.training.tasks.base import Forward, Task

_SEED = 0
"""Seed of the sample order, independent of the run's seed: all seeds use the same validation samples."""


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
        count_per_rank = -(-count // world.size)
        numbers = torch.arange(count_per_rank) * world.size + world.rank
        with closing(iter(stream)) as batches:
            parts: list[BatchType] = []
            for _ in range(-(-count // lanes)):
                parts.append(next(batches))
                beat()
        samples = Batch.cat(parts)
        # If the samples do not divide evenly over the ranks, a rank pads with its first sample, masked out.
        exists = numbers < count
        samples = samples.select(torch.where(exists, numbers, numbers[0].clamp(max=count - 1)))
        samples = replace(samples, valid=samples.valid & exists)
        self._batches = [
            samples.select(rows) for rows in torch.arange(count_per_rank).split(config.batch_size)
        ]

    @torch.no_grad()
    def metrics(self, forward: Forward) -> dict[str, float]:
        """Return the task's metrics as means over all validation samples; collective."""
        sums: dict[str, Tensor] = {}
        for samples in self._batches:
            beat()
            batch = samples.to(self._world.device, non_blocking=True)
            for name, value in self._task.validate(forward, batch).items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        names = sorted(sums)
        totals = self._world.sum(torch.stack([sums[name] for name in names])).cpu()
        return {name: float(total / count) for name, (total, count) in zip(names, totals, strict=True)}
