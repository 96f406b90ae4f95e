"""The moving average of the weights, kept on this rank's share of them."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from pydantic import PositiveFloat, PositiveInt

from vqd_scale.core.config import Config
from vqd_scale.training.partition import Partition


class EMAConfig(Config):
    """How long the average remembers."""

    half_life_images: PositiveInt = 500_000
    """Images after which a weight's old value counts half."""
    warmup_ratio: PositiveFloat = 0.05
    """Early on the half-life is at most this share of the images seen, so that the start is forgotten."""


class EMA:
    """One flat tensor beside each of the partition's; no communication.

    Args:
        config: How long it remembers.
        partition: The weights to average.
    """

    def __init__(self, config: EMAConfig, partition: Partition) -> None:
        self.config = config
        self.partition = partition
        self.flats = [master.detach().clone() for master in partition.masters]

    @torch.no_grad()
    def restart(self) -> None:
        """Forget everything: the average is the weights as they are now."""
        for average, master in zip(self.flats, self.partition.masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Average in the weights after a step.

        Args:
            images: Images seen so far, this batch included.
            batch: Images in this batch.
        """
        half_life = min(self.config.half_life_images, self.config.warmup_ratio * images)
        for average, master in zip(self.flats, self.partition.masters, strict=True):
            average.lerp_(master, 1 - 0.5 ** (batch / half_life))

    @contextmanager
    def in_place_of_weights(self) -> Generator[None]:
        """Let the network compute with the average for a while; all ranks together.

        Each rank swaps its own share, nothing is gathered. Afterwards every bit of weights and average is
        what it was, since they were only copied.
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
