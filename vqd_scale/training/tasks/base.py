"""What the training loop asks of whatever it trains."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.data.loading.sample_readers import SampleKind
from vqd_scale.training.partition import Partition

BatchType = TypeVar("BatchType", TokenBatch, ImageBatch)
Forward = Callable[..., Any]
"""A task's module, wrapped by the engine."""


class Losses(NamedTuple):
    """What a task makes of a batch.

    Attributes:
        per_sample: Differentiable, float32 [batch]; the loop weighs bad samples out and averages.
        statistics: Detached (sum, count) pairs, float [2], that a person watches beside the loss.
        facts: What else a report names of each sample whose loss is not finite, such as its time.
    """

    per_sample: Tensor
    statistics: dict[str, Tensor]
    facts: dict[str, Tensor] | None = None


def mean_of(values: Float[Tensor, " batch"], weight: Float[Tensor, " batch"]) -> Float[Tensor, " 2"]:
    """A statistic of a batch, (sum, count), of values under weights 0 and 1."""
    return torch.stack([torch.where(weight > 0, values.detach().double(), 0.0).sum(), weight.sum()])


class Task(Protocol[BatchType]):
    """Something to train: a module that goes into the engine, and how a batch becomes losses."""

    @property
    def module(self) -> nn.Module:
        """Holds every trained parameter, and nothing that is frozen; its forward is what the engine wraps."""
        ...

    @property
    def units(self) -> Sequence[type[nn.Module]]:
        """Kinds of submodules whose parameters are gathered in one message, such as blocks.

        Their inputs must require gradients: the engine takes a unit's gradients to be complete when those of
        its inputs are.
        """
        ...

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one sample's forward through the network that is trained."""
        ...

    def init_weights(self, partition: Partition) -> None:
        """Called on all ranks before the first step of a new run: its weights may still be replaced."""
        ...

    def samples(self) -> SampleKind[BatchType]:
        """What kind of samples the stream is to read."""
        ...

    def losses(self, forward: Forward, batch: BatchType, images: int) -> Losses:
        """The losses of this rank's part of a batch.

        Args:
            forward: Stands for the module.
            batch: The samples, on the CPU.
            images: Images the run had seen before this batch.
        """
        ...

    def validate(self, forward: Forward, batch: BatchType) -> dict[str, Tensor]:
        """What held-out samples say of the weights, drawing on nothing that the run did.

        Args:
            forward: Stands for the module; no gradient is wanted.
            batch: Held-out samples, on the CPU.

        Returns:
            (sum, count) pairs, float [2]; the same names for every batch.
        """
        ...

    def on_step_end(self, images: int) -> None:
        """Called on all ranks after the optimizer's step, with the images seen by then."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the task remembers beside the module's parameters, equal on all ranks."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back."""
        ...

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write the trained model as a bundle (called on the first rank only)."""
        ...
