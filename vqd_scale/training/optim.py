"""Parameter groups and the learning rate, a function of images seen; `Plateau` also depends on the loss."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqd_scale.training.config import OptimConfig, Plateau
from vqd_scale.training.partition import shape_of


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """Return an optimizer of a module's trainable parameters in two groups, with and without weight decay."""
    undecayed = {
        id(parameter)
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if config.weight_decay_on == "matrices"
        if isinstance(child, nn.Embedding) or len(shape_of(parameter)) < 2 or name == "null"
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in undecayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) in undecayed], "weight_decay": 0.0},
    ]
    return config.build([group for group in groups if group["params"]])


class PlateauFeedback:
    """Reduction of the learning rate on a loss plateau, equal on all ranks because the loss is.

    Args:
        config: Schedule configuration.
        batch: Global batch size.
    """

    def __init__(self, config: Plateau, batch: int) -> None:
        self.config = config
        self.batch = batch
        self._smoothed = self._best = math.inf
        self._best_at = 0
        self._reduction = 1.0

    def reduced(self, rate: float) -> float:
        """Return a learning rate after all reductions."""
        return max(self.config.minimum, rate * self._reduction) if self._reduction < 1 else rate

    def observe(self, images: int, loss: float) -> None:
        """Update the moving average of the loss, and reduce the learning rate on a plateau."""
        weight = 0.5 ** (self.batch / self.config.smoothing_images)
        is_first = math.isinf(self._smoothed)
        self._smoothed = loss if is_first else weight * self._smoothed + (1 - weight) * loss
        if is_first or self._smoothed < self._best * (1 - self.config.threshold):
            self._best, self._best_at = self._smoothed, images
        elif images - self._best_at > self.config.patience_images:
            self._reduction *= self.config.factor
            self._best_at = images

    def state(self) -> dict[str, Tensor]:
        """Return the state as tensors, equal on all ranks."""
        values = [self._smoothed, self._best, self._best_at, self._reduction]
        return {"plateau": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self._smoothed, self._best, best_at, self._reduction = state["plateau"].tolist()
        self._best_at = int(best_at)


class LearningRate:
    """Learning rate of a run: warmup, scaling with the batch size, and schedule.

    Args:
        config: Optimizer configuration.
        batch: Global batch size.
        horizon: Length of the run in images.

    Attributes:
        peak: Learning rate after the warmup.
    """

    def __init__(self, config: OptimConfig, batch: int, horizon: int) -> None:
        self.config = config
        self.horizon = horizon
        scaling = config.lr_scaling
        self.peak = config.lr if scaling is None else config.lr * scaling.multiplier(batch)
        self._feedback = config.schedule.feedback(batch)

    def at(self, images: int) -> float:
        """Return the learning rate of the step that starts after ``images`` images."""
        warmup, low = self.config.warmup_images, self.config.warmup_start_lr
        warm = min(1.0, (images + 1) / warmup) if warmup else 1.0
        multiplier = self.config.schedule.multiplier(min(1.0, images / self.horizon))
        rate = (self.peak * warm + low * (1 - warm)) * multiplier
        return rate if self._feedback is None else self._feedback.reduced(rate)

    def observe(self, images: int, loss: float) -> None:
        """Update a schedule that depends on the loss, after a step.

        Args:
            images: Images seen, including this step's batch.
            loss: Mean loss over the global batch, equal on all ranks.
        """
        if self._feedback is not None and images >= self.config.warmup_images and math.isfinite(loss):
            self._feedback.observe(images, loss)

    def state(self) -> dict[str, Tensor]:
        """Return the state of a schedule that depends on the loss, equal on all ranks."""
        return {} if self._feedback is None else self._feedback.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`; a schedule that begins to depend on the loss starts anew."""
        if self._feedback is not None and state:
            self._feedback.load_state(state)
