"""AdamW, and learning rates as functions of images seen; one of them follows the loss, too."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn, optim

from vqd_scale.core.config import Config
from vqd_scale.training.partition import shape_of


class ConstantRate(Config):
    """The full learning rate to the end."""

    kind: Literal["constant"] = "constant"


class Cooldown(Config):
    """The full learning rate, then straight down to zero over the last share of the run."""

    kind: Literal["cooldown"] = "cooldown"
    cooldown_fraction: float = Field(default=0.2, gt=0, le=1)


class Cosine(Config):
    """Half a cosine from the full learning rate to zero."""

    kind: Literal["cosine"] = "cosine"


class Plateau(Config):
    """Lower the learning rate whenever the loss has stopped falling, as VQ-Diffusion was trained.

    The loss is that of the whole batch, so that all ranks agree, and smoothed, so that no lucky batch becomes
    the mark to beat. Nothing is counted before the warm-up is over.
    """

    kind: Literal["plateau"] = "plateau"
    factor: float = Field(default=0.5, gt=0, lt=1)
    patience_images: PositiveInt = 1_920_000
    """Images without improvement after which the rate falls (the released 60,000 steps of 32)."""
    threshold: float = Field(default=0.1, ge=0, lt=1)
    """What is an improvement: a loss lower than the best one by this share of it."""
    minimum: NonNegativeFloat = 1e-6
    smoothing_images: PositiveInt = 32_000
    """Images after which a batch's part in the smoothed loss is half."""


Schedule = Annotated[ConstantRate | Cooldown | Cosine | Plateau, Field(discriminator="kind")]


class BatchScaling(Config):
    """How the learning rate follows the global batch, where a recipe says that it does."""

    reference_batch_size: PositiveInt
    """The global batch that ``lr`` is meant for."""
    rule: Literal["linear", "square-root"] = "square-root"
    """Linear for SGD-like noise (Goyal et al., 2017), square root for Adam (Malladi et al., 2022)."""


class OptimConfig(Config):
    """AdamW and its learning rate."""

    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: NonNegativeFloat = 0.045
    weight_decay_on: Literal["matrices", "everything"] = "matrices"
    """Matrices and convolution kernels only, or biases, norms, embeddings and null condition as well."""
    gradient_clipping: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises."""
    warmup_start_lr: NonNegativeFloat = 0.0
    """The learning rate that it rises from."""
    schedule: Schedule = Cooldown()
    lr_scaling: BatchScaling | None = None
    """If given, ``lr`` is for a batch of that size and is scaled to ``data.global_batch_size``."""


def build_optimizer(module: nn.Module, config: OptimConfig) -> optim.AdamW:
    """AdamW over a module's trainable parameters in two groups, with and without weight decay."""
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
    # Fused: weights, gradients and moments are gone through once and not ten times.
    return optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def peak_rate(config: OptimConfig, batch: int) -> float:
    """The full learning rate at a global batch."""
    if config.lr_scaling is None:
        return config.lr
    ratio = batch / config.lr_scaling.reference_batch_size
    return config.lr * (ratio if config.lr_scaling.rule == "linear" else math.sqrt(ratio))


class LearningRate:
    """The learning rate of a run: at each step a function of images seen, and of how the loss went.

    Args:
        config: The optimizer's.
        batch: Images in a global batch.
        horizon: Images at which the run ends.
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
        """The learning rate of the step that starts after so many images."""
        warmup, low = self.config.warmup_images, self.config.warmup_start_lr
        warm = min(1.0, (images + 1) / warmup) if warmup else 1.0
        rate = (self.peak * warm + low * (1 - warm)) * _shape(self.config.schedule, images, self.horizon)
        if isinstance(self.config.schedule, Plateau) and self._lowered < 1:
            return max(self.config.schedule.minimum, rate * self._lowered)
        return rate

    def observe(self, images: int, loss: float) -> None:
        """Take note of a step.

        Args:
            images: Images seen, this step's batch included.
            loss: The whole batch's, equal on all ranks.
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
        """What must be saved, equal on all ranks."""
        values = [self._smoothed, self._best, self._best_at, self._lowered]
        return {"plateau": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back."""
        self._smoothed, self._best, best_at, self._lowered = state["plateau"].tolist()
        self._best_at = int(best_at)


def _shape(schedule: Schedule, images: int, horizon: int) -> float:
    """The share of the full rate that a schedule leaves."""
    done = min(1.0, images / horizon)
    if isinstance(schedule, Cooldown):
        return min(1.0, (1 - done) / schedule.cooldown_fraction)
    if isinstance(schedule, Cosine):
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0
