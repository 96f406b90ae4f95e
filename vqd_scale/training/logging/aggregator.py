"""What a row of metrics holds: sums between two rows, brought together over ranks only when one is due."""

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
"""Rows of the matrix that every rank squares now and then, alone, to see how fast it is."""


class MetricAggregator:
    """The rows of a run.

    Args:
        config: The run.
        world: This process's place among the ranks.
        images: Where the run starts or goes on from.
        ideal_seconds: What an image would take all ranks together at their devices' peak, if that is known.
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
        """Begin to sum for the next row."""
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
        """The next batch; how long it took to come is counted."""
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    def add(self, loss: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Count a part of a batch: its summed loss, and the task's (sum, count) pairs."""
        self._sums["loss"] = self._sums["loss"] + torch.stack([loss, loss.new_zeros(())]).double().cpu()
        for name, value in statistics.items():
            self._sums[name] = self._sums[name] + value.double().cpu()

    def add_step(self, valid: Tensor, rate: float) -> None:
        """Count a batch: its samples that are valid, over all ranks, and the learning rate."""
        self._valid = self._valid + valid.double().cpu()
        self._rate = rate

    def add_gradient(self, own_squared_norm: Tensor, norm: float) -> None:
        """Count the gradient of a step that was taken.

        Args:
            own_squared_norm: Sum over this rank's parts of the batch of their gradients' squared norms.
            norm: Norm of the whole batch's gradient.
        """
        self._norm = norm
        self._small = self._small + own_squared_norm.double().cpu()
        self._big += norm**2
        self._steps += 1

    @property
    def wait_share(self) -> float:
        """The share of time between the last two rows that this rank waited for data."""
        return self._last_wait_share

    @property
    def utilisation(self) -> float | None:
        """The share of all devices' peak between the last two rows, where the peak is known."""
        return None if self._ideal_seconds is None else self._last_rate * self._ideal_seconds

    def add_skipped(self) -> None:
        """Count a batch that was not learned from."""
        self.skipped += 1

    def write(self, images: int, more: Mapping[str, float]) -> float:
        """Write the row that is due; all ranks together.

        Args:
            images: Images seen.
            more: Figures that are known already, such as those of held-out samples.

        Returns:
            The mean loss since the last row.
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
        """Let all writers finish."""
        if self.diary is not None:
            self.diary.close()

    def _noise(self, small: float) -> dict[str, float]:
        if self._parts == 1 or not self._steps:
            return {}
        # Each part's gradient arrives divided by the number of a rank's parts.
        scale = noise_scale(
            small * self._accumulation**2 / self._steps / self._parts,
            self._big / self._steps,
            self._batch / self._parts,
            self._batch,
        )
        return {"gradient_noise_scale": scale} if scale == scale else {}


def _alone(device: torch.device) -> float:
    """Seconds that this rank takes for a fixed piece of work that it does alone: slow machines show.

    Steps last equally long on all ranks, since each waits for the slowest.
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
    """Bytes: of the GPU's memory since the start of the process, or of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
