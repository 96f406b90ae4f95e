"""Aggregation of metrics between two log rows; ranks are reduced only when a row is due."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vqd_scale.core.world import World
from vqd_scale.training.config import RunConfig
from vqd_scale.training.health import noise_scale
from vqd_scale.training.logging.metrics import MetricLogger
from vqd_scale.training.tasks.base import BatchType

_PROBE_SIZE = 256
"""Side of the matrix that every rank squares to measure its own speed."""


class MetricAggregator:
    """Aggregator and writer of a run's metric rows.

    Args:
        config: Run configuration.
        world: This process's rank and device.
        images: Images seen at the start or resume.
        ideal_seconds: Seconds per image at the peak FLOPS of all devices together, if known.
    """

    def __init__(
        self, config: RunConfig, world: World, images: int, ideal_seconds: float | None = None
    ) -> None:
        self.world = world
        self._ideal_seconds = ideal_seconds
        self.diary = (
            MetricLogger(config.log, config.run, images, config.model_dump(mode="json"))
            if world.is_first
            else None
        )
        self._batch = config.data.global_batch_size
        self._accumulation = config.engine.gradient_accumulation_steps
        self._parts = world.size * config.engine.gradient_accumulation_steps
        self.skipped = 0
        self._last_wait_share = 0.0
        self._last_rate = 0.0
        self.start()

    def start(self) -> None:
        """Reset the sums for the next row."""
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self._valid = torch.zeros((), dtype=torch.float64)
        self._small = torch.zeros((), dtype=torch.float64)
        self._big = 0.0
        self._steps = 0
        self._norm = 0.0
        self._rate = 0.0
        self._waited = 0.0
        self._since = time.monotonic()

    def waited_for(self, batches: Iterator[BatchType]) -> BatchType:
        """Return the next batch and count the time spent waiting for it."""
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    def add(self, loss: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's summed loss and the task's (sum, count) pairs."""
        self._sums["loss"] = self._sums["loss"] + torch.stack([loss, loss.new_zeros(())]).double().cpu()
        for name, value in statistics.items():
            self._sums[name] = self._sums[name] + value.double().cpu()

    def add_step(self, valid: Tensor, rate: float) -> None:
        """Add a batch's number of valid samples over all ranks, and set the learning rate."""
        self._valid = self._valid + valid.double().cpu()
        self._rate = rate

    def add_gradient(self, own_squared_norm: Tensor, norm: float) -> None:
        """Add the gradient of an applied step.

        Args:
            own_squared_norm: Sum of the squared gradient norms of this rank's micro-batches.
            norm: Gradient norm of the global batch.
        """
        self._norm = norm
        self._small = self._small + own_squared_norm.double().cpu()
        self._big += norm**2
        self._steps += 1

    @property
    def wait_share(self) -> float:
        """Fraction of the time between the last two rows that this rank waited for data."""
        return self._last_wait_share

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilization (MFU) between the last two rows; ``None`` if the peak FLOPS is unknown."""
        return None if self._ideal_seconds is None else self._last_rate * self._ideal_seconds

    def add_skipped(self) -> None:
        """Count a skipped batch."""
        self.skipped += 1

    def write(self, images: int, more: Mapping[str, float]) -> float:
        """Reduce the sums over ranks and write a row; collective.

        Args:
            images: Images seen.
            more: Further metrics, such as validation metrics.

        Returns:
            Mean loss since the last row.
        """
        names = sorted(self._sums)
        seconds = time.monotonic() - self._since
        own = torch.zeros(self.world.size, 2, dtype=torch.float64)
        own[self.world.rank] = torch.tensor([self._waited / seconds, _alone(self.world.device)])
        said = torch.cat(
            [*(self._sums[name] for name in names), own.flatten(), self._small[None]],
        )
        totals = self.world.sum(said.to(self.world.device)).cpu()
        sums, ranks, small = totals.split([2 * len(names), own.numel(), 1])
        valid = float(self._valid)
        means = {
            name: float(total / (valid if name == "loss" else count))
            for name, (total, count) in zip(names, sums.unflatten(0, (-1, 2)), strict=True)
            if name == "loss" or count > 0
        }
        waits, alone = ranks.unflatten(0, (-1, 2)).unbind(dim=1)
        self._last_rate = valid / seconds
        utilisation = {} if self.utilisation is None else {"model_flops_utilisation": self.utilisation}
        row = {
            "images": images,
            **means,
            **more,
            "learning_rate": self._rate,
            "gradient_norm": self._norm,
            **self._noise(float(small)),
            "images_per_second": self._last_rate,
            **utilisation,
            "data_wait_share": self._waited / seconds,
            "longest_data_wait_share": float(waits.max()),
            "slowest_rank": int(alone.argmax()),
            "slowest_rank_slowness": float(alone.max() / alone.median()),
            "peak_memory_gigabytes": _peak_memory(self.world.device) / 1e9,
            "skipped_batches": self.skipped,
        }
        if self.diary is not None:
            self.diary.write(row)
        self._last_wait_share = self._waited / seconds
        self.start()
        return means["loss"]

    def close(self) -> None:
        """Close all writers."""
        if self.diary is not None:
            self.diary.close()

    def _noise(self, small: float) -> dict[str, float]:
        if self._parts == 1 or not self._steps:
            return {}
        # The engine divides each micro-batch's gradient by the number of accumulation steps.
        scale = noise_scale(
            small * self._accumulation**2 / self._steps / self._parts,
            self._big / self._steps,
            self._batch / self._parts,
            self._batch,
        )
        return {"gradient_noise_scale": scale} if scale == scale else {}


def _alone(device: torch.device) -> float:
    """Measure the seconds of a fixed local computation, to detect stragglers.

    Step times do not show a straggler: every rank waits for the slowest, so they are equal on all ranks.
    """
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        del product
    return best


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory in bytes since process start: GPU memory on CUDA, else host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
