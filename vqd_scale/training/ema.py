"""Exponential moving average (EMA) of the weights, partitioned over the ranks."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from vqd_scale.training.config import EMAConfig
from vqd_scale.training.partition import Partition


class EMA:
    """EMA of this rank's master weights; updates need no communication.

    Args:
        config: Decay of the average.
        partition: Weights to average.
    """

    def __init__(self, config: EMAConfig, partition: Partition) -> None:
        self.config = config
        self.partition = partition
        self.flats = [master.detach().clone() for master in partition.masters]

    @torch.no_grad()
    def restart(self) -> None:
        """Reset the average to the current weights."""
        for average, master in zip(self.flats, self.partition.masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Update the average after a step.

        Args:
            images: Images seen, including this batch.
            batch: Images in this batch.
        """
        half_life = min(self.config.half_life_images, self.config.warmup_ratio * images)
        for average, master in zip(self.flats, self.partition.masters, strict=True):
            average.lerp_(master, 1 - 0.5 ** (batch / half_life))

    @contextmanager
    def in_place_of_weights(self) -> Generator[None]:
        """Swap the EMA weights into the network for the duration of the context; collective.

        Each rank swaps its own partition without a gather. Weights and average are only copied, so both are
        restored bit for bit on exit.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.flats, self.partition.masters, strict=True):
            weights = master.detach().clone()
            master.copy_(average)
            average.copy_(weights)
        self.partition.masters_changed()
