"""Aggregation of metrics between two log rows; ranks are reduced only when a row is due."""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import BatchType
from vqd_scale.training.config import RunConfig
from vqd_scale.training.health import noise_scale
from vqd_scale.training.logging.metrics import MetricLogger

_PROBE_SIZE = 256
"""Side of the matrix that every rank squares to measure its own speed."""


class MetricAggregator:
    """Aggregator and writer of a run's metric rows.

    Args:
        config: Run configuration.
        world: This process's rank and device.
        images: Images seen at the start or resume.
        ideal_seconds: Seconds per image at the peak FLOPS of all devices together, if known.

    Attributes:
        wait_fraction: Fraction of the time between the last two rows that this rank waited for data.
    """

    def __init__(
        self, config: RunConfig, world: World, images: int, ideal_seconds: float | None = None
    ) -> None:
        self.world = world
        self._ideal_seconds = ideal_seconds
        settings = config.model_dump(mode="json")
        self._logger = MetricLogger(config.log, config.run, images, settings) if world.is_first else None
        self._batch = config.data.global_batch_size
        self._accumulation = config.engine.gradient_accumulation_steps
        self._parts = world.size * config.engine.gradient_accumulation_steps
        self.wait_fraction = 0.0
        self._images_per_second = 0.0
        self.reset()

    def reset(self) -> None:
        """Reset the sums for the next row."""
        # On the device: reading a value makes the host wait for it.
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self._sums: dict[str, Tensor] = defaultdict(lambda: zero.expand(2))
        self._valid = 0.0
        self._small = self._big = zero
        self._steps = 0
        self._norm = zero
        self._learning_rate = 0.0
        self._wait_seconds = 0.0
        self._start = time.monotonic()

    def next_batch(self, batches: Iterator[BatchType]) -> BatchType:
        """Return the next batch and count the time spent waiting for it."""
        start = time.monotonic()
        batch = next(batches)
        self._wait_seconds += time.monotonic() - start
        return batch

    def add_losses(self, loss: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's summed loss and the task's (sum, count) pairs."""
        self._sums["loss"] = self._sums["loss"] + torch.stack([loss, loss.new_zeros(())]).double()
        for name, value in statistics.items():
            self._sums[name] = self._sums[name] + value.double()

    def add_step(self, valid: float, learning_rate: float) -> None:
        """Add a batch's number of valid samples over all ranks, and set the learning rate."""
        self._valid += valid
        self._learning_rate = learning_rate

    def add_gradient(self, local_squared_norm: Tensor, norm: Tensor) -> None:
        """Add the gradient of an applied step.

        Args:
            local_squared_norm: Sum of the squared gradient norms of this rank's micro-batches.
            norm: Gradient norm of the global batch.
        """
        self._norm = norm
        self._small = self._small + local_squared_norm.double()
        self._big = self._big + norm.double() ** 2
        self._steps += 1

    @property
    def utilization(self) -> float | None:
        """Model FLOPs utilization (MFU) between the last two rows; ``None`` if the peak FLOPS is unknown."""
        return None if self._ideal_seconds is None else self._images_per_second * self._ideal_seconds

    def write(self, images: int, extra_metrics: Mapping[str, float]) -> float:
        """Reduce the sums over ranks and write a row; collective.

        Args:
            images: Images seen.
            extra_metrics: Further metrics, such as validation metrics.

        Returns:
            Mean loss since the last row; NaN without a valid sample.
        """
        names = sorted(self._sums)
        seconds = time.monotonic() - self._start
        self.wait_fraction = self._wait_seconds / seconds
        rank_values = torch.zeros(self.world.size, 2, dtype=torch.float64)
        rank_values[self.world.rank] = torch.tensor(
            [self.wait_fraction, _benchmark_seconds(self.world.device)]
        )
        local_sums = torch.cat(
            [
                *(self._sums[name] for name in names),
                rank_values.flatten().to(self.world.device),
                self._small[None],
            ]
        )
        totals = self.world.sum(local_sums).cpu()
        sums, rank_values, small = totals.split([2 * len(names), rank_values.numel(), 1])
        # Nothing has a mean if all batches were skipped, or all samples were bad.
        means = {
            name: float(total / (self._valid if name == "loss" else count))
            for name, (total, count) in zip(names, sums.unflatten(0, (-1, 2)), strict=True)
            if (self._valid if name == "loss" else count) > 0
        }
        wait_fractions, benchmark_seconds = rank_values.unflatten(0, (-1, 2)).unbind(dim=1)
        self._images_per_second = self._valid / seconds
        utilization = {} if self.utilization is None else {"model_flops_utilization": self.utilization}
        row = {
            "images": images,
            **means,
            **extra_metrics,
            "learning_rate": self._learning_rate,
            "gradient_norm": float(self._norm),
            **self._noise(float(small)),
            "images_per_second": self._images_per_second,
            **utilization,
            "data_wait_fraction": self.wait_fraction,
            "longest_data_wait_fraction": float(wait_fractions.max()),
            "slowest_rank": int(benchmark_seconds.argmax()),
            "slowest_rank_slowness": float(benchmark_seconds.max() / benchmark_seconds.median()),
            "peak_memory_gigabytes": _peak_memory(self.world.device) / 1e9,
        }
        if self._logger is not None:
            self._logger.write(row)
        self.reset()
        return means.get("loss", math.nan)

    def close(self) -> None:
        """Close all writers."""
        if self._logger is not None:
            self._logger.close()

    def _noise(self, small: float) -> dict[str, float]:
        if self._parts == 1 or not self._steps:
            return {}
        # The engine divides each micro-batch's gradient by the number of accumulation steps.
        scale = noise_scale(
            small * self._accumulation**2 / self._steps / self._parts,
            float(self._big) / self._steps,
            self._batch / self._parts,
            self._batch,
        )
        return {"gradient_noise_scale": scale} if scale == scale else {}


def _benchmark_seconds(device: torch.device) -> float:
    """Measure the seconds of a fixed local computation, to detect stragglers.

    Step times do not show a straggler: every rank waits for the slowest, so they are equal on all ranks.
    """
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        del product
    return best


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory in bytes since process start: GPU memory on CUDA, else host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
