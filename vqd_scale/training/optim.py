"""AdamW and learning-rate schedules as functions of images seen; `Plateau` also depends on the loss."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn, optim

from vqd_scale.core.config import Config
from vqd_scale.training.partition import shape_of


class ConstantRate(Config):
    """Constant learning rate."""

    kind: Literal["constant"] = "constant"


class Cooldown(Config):
    """Constant learning rate, then linear decay to zero."""

    kind: Literal["cooldown"] = "cooldown"
    cooldown_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the run, at its end, over which the learning rate decays."""


class Cosine(Config):
    """Cosine decay from the peak learning rate to zero."""

    kind: Literal["cosine"] = "cosine"


class Plateau(Config):
    """Learning rate reduced on a loss plateau, as in VQ-Diffusion's training.

    The loss is the mean over the global batch, so all ranks take the same decision. It is smoothed, so one
    low batch loss does not become the best. Observation starts after the warmup.
    """

    kind: Literal["plateau"] = "plateau"
    factor: float = Field(default=0.5, gt=0, lt=1)
    patience_images: PositiveInt = 1_920_000
    """Images without improvement before a reduction (the released model: 60,000 steps of 32 images)."""
    threshold: float = Field(default=0.1, ge=0, lt=1)
    """Relative decrease of the loss that counts as an improvement."""
    minimum: NonNegativeFloat = 1e-6
    smoothing_images: PositiveInt = 32_000
    """Half-life, in images, of the moving average of the loss."""


Schedule = Annotated[ConstantRate | Cooldown | Cosine | Plateau, Field(discriminator="kind")]


class BatchScaling(Config):
    """Scaling of the learning rate with the global batch size."""

    reference_batch_size: PositiveInt
    """Global batch size for which ``lr`` is given."""
    rule: Literal["linear", "square-root"] = "square-root"
    """Linear for SGD-like noise (Goyal et al., 2017), square root for Adam (Malladi et al., 2022)."""


class OptimConfig(Config):
    """AdamW and its learning rate."""

    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: NonNegativeFloat = 0.045
    weight_decay_on: Literal["matrices", "everything"] = "matrices"
    """Parameters with weight decay. ``matrices``: matrices and convolution kernels. ``everything``: biases,
    norms, embeddings and the null condition as well."""
    gradient_clipping: PositiveFloat = 1.0
    """Maximum global gradient norm."""
    warmup_images: NonNegativeInt = 0
    """Length of the linear learning-rate warmup in images."""
    warmup_start_lr: NonNegativeFloat = 0.0
    """Learning rate at the start of the warmup."""
    schedule: Schedule = Cooldown()
    lr_scaling: BatchScaling | None = None
    """If given, ``lr`` is scaled from ``reference_batch_size`` to ``data.global_batch_size``."""


def build_optimizer(module: nn.Module, config: OptimConfig) -> optim.AdamW:
    """Return AdamW over a module's trainable parameters in two groups, with and without weight decay."""
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
    groups = [group for group in groups if group["params"]]
    # Fused: one pass over weights, gradients and moments instead of ten.
    return optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def peak_rate(config: OptimConfig, batch: int) -> float:
    """Return the peak learning rate at a global batch size."""
    if config.lr_scaling is None:
        return config.lr
    ratio = batch / config.lr_scaling.reference_batch_size
    return config.lr * (ratio if config.lr_scaling.rule == "linear" else math.sqrt(ratio))


class LearningRate:
    """Learning rate of a run as a function of images seen and, with `Plateau`, of the loss.

    Args:
        config: Optimizer configuration.
        batch: Global batch size.
        horizon: Length of the run in images.
    """

    def __init__(self, config: OptimConfig, batch: int, horizon: int) -> None:
        self.config = config
        self.batch = batch
        self.horizon = horizon
        self.peak = peak_rate(config, batch)
        self._smoothed = self._best = math.inf
        self._best_at = 0
        self._lowered = 1.0

    def at(self, images: int) -> float:
        """Return the learning rate of the step that starts after ``images`` images."""
        warmup, low = self.config.warmup_images, self.config.warmup_start_lr
        warm = min(1.0, (images + 1) / warmup) if warmup else 1.0
        rate = (self.peak * warm + low * (1 - warm)) * _shape(self.config.schedule, images, self.horizon)
        if isinstance(self.config.schedule, Plateau) and self._lowered < 1:
            return max(self.config.schedule.minimum, rate * self._lowered)
        return rate

    def observe(self, images: int, loss: float) -> None:
        """Update the plateau state after a step.

        Args:
            images: Images seen, including this step's batch.
            loss: Mean loss over the global batch, equal on all ranks.
        """
        schedule = self.config.schedule
        if not isinstance(schedule, Plateau) or images < self.config.warmup_images or not math.isfinite(loss):
            return
        kept = 0.5 ** (self.batch / schedule.smoothing_images)
        is_first = math.isinf(self._smoothed)
        self._smoothed = loss if is_first else kept * self._smoothed + (1 - kept) * loss
        if is_first or self._smoothed < self._best * (1 - schedule.threshold):
            self._best, self._best_at = self._smoothed, images
        elif images - self._best_at > schedule.patience_images:
            self._lowered *= schedule.factor
            self._best_at = images

    def state(self) -> dict[str, Tensor]:
        """Return the plateau state as tensors, equal on all ranks."""
        values = [self._smoothed, self._best, self._best_at, self._lowered]
        return {"plateau": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self._smoothed, self._best, best_at, self._lowered = state["plateau"].tolist()
        self._best_at = int(best_at)


def _shape(schedule: Schedule, images: int, horizon: int) -> float:
    """Return the schedule's factor on the peak learning rate."""
    done = min(1.0, images / horizon)
    if isinstance(schedule, Cooldown):
        return min(1.0, (1 - done) / schedule.cooldown_fraction)
    if isinstance(schedule, Cosine):
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0
