"""Interface between the training loop and a training task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import BatchType
from vqd_scale.data.loading.sample_readers import SampleKind
from vqd_scale.training.partition import Partition

Forward = Callable[..., Any]
"""Forward of a task's module, wrapped by the engine."""


class Losses(NamedTuple):
    """Losses and metrics of a batch.

    Attributes:
        per_sample: Differentiable loss of each sample, float32 [batch]. The loop masks out bad samples and
            averages.
        statistics: Detached (sum, count) pairs of metrics to log, float [2].
        facts: Values to report for each sample with a nonfinite loss, such as its timestep.
    """

    per_sample: Tensor
    statistics: dict[str, Tensor]
    facts: dict[str, Tensor] | None = None


def mean_of(values: Float[Tensor, " batch"], weight: Float[Tensor, " batch"]) -> Float[Tensor, " 2"]:
    """Return the (sum, count) pair of a batch's values under a 0/1 weight."""
    return torch.stack([torch.where(weight > 0, values.detach().double(), 0.0).sum(), weight.sum()])


class Task(ABC, Generic[BatchType]):
    """Training task: a module for the engine and the computation of losses from a batch.

    Attributes:
        world: This process's rank and device.
        module: Module with all trainable parameters and no frozen ones; the engine wraps its forward.
        units: Submodule types, such as blocks, whose parameters are gathered in one message. The inputs of a
            unit must require gradients: the engine treats a unit's gradients as complete when the gradients
            of its inputs are complete.
    """

    world: World
    module: nn.Module
    units: Sequence[type[nn.Module]] = ()

    @property
    @abstractmethod
    def forward_flops(self) -> int:
        """FLOPs of the trained network's forward pass for one sample."""

    @abstractmethod
    def samples(self) -> SampleKind[BatchType]:
        """Return the kind of samples that the stream reads."""

    @abstractmethod
    def losses(self, forward: Forward, batch: BatchType, images: int) -> Losses:
        """Compute the losses of a micro-batch of this rank.

        Args:
            forward: Engine-wrapped forward of the module.
            batch: Samples, on the rank's device.
            images: Images seen before this batch.
        """

    @abstractmethod
    def validate(self, forward: Forward, batch: BatchType) -> dict[str, Tensor]:
        """Compute validation metrics, independently of the run's random state.

        Args:
            forward: Engine-wrapped forward of the module; called without gradients.
            batch: Validation samples, on the rank's device.

        Returns:
            (sum, count) pairs, float [2]; the same names for every batch.
        """

    @abstractmethod
    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write the trained model as a bundle; called on the first rank only."""

    def init_weights(self, partition: Partition) -> None:
        """Replace initial weights, if needed; called on all ranks before the first step of a new run."""

    def on_step_end(self, images: int) -> None:
        """Update the task after an optimizer step, at ``images`` images seen; called on all ranks."""

    def state(self) -> dict[str, Tensor]:
        """Return the task's state apart from the module's parameters, equal on all ranks."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
