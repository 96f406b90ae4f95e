"""AdamW with decay groups, and learning rates as functions of images seen."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn, optim

from vqd_scale.core.config import Config


class Constant(Config):
    """The full learning rate to the end."""

    kind: Literal["constant"] = "constant"


class Cooldown(Config):
    """The full learning rate, then straight down to zero over the last share of the run."""

    kind: Literal["cooldown"] = "cooldown"
    share: float = Field(default=0.2, gt=0, le=1)


class Cosine(Config):
    """Half a cosine from the full learning rate to zero."""

    kind: Literal["cosine"] = "cosine"


Schedule = Annotated[Constant | Cooldown | Cosine, Field(discriminator="kind")]


class OptimConfig(Config):
    """AdamW and its learning rate."""

    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: NonNegativeFloat = 0.045
    """Applied to matrices and convolution kernels, not to biases, norms and embeddings."""
    clip: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    warmup: NonNegativeInt = 0
    """Images over which the learning rate rises from zero."""
    schedule: Schedule = Cooldown()


def build_optimizer(module: nn.Module, config: OptimConfig) -> optim.AdamW:
    """AdamW over a module's trainable parameters in two groups, with and without weight decay."""
    undecayed = {
        id(parameter)
        for child in module.modules()
        for name, parameter in child.named_parameters(recurse=False)
        if isinstance(child, nn.Embedding) or parameter.ndim < 2 or name == "null"
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in undecayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) in undecayed], "weight_decay": 0.0},
    ]
    return optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def learning_rate(config: OptimConfig, images: int, horizon: int) -> float:
    """The learning rate of the step that starts after ``images`` images of a run of ``horizon``."""
    warm = min(1.0, (images + 1) / config.warmup) if config.warmup else 1.0
    done = min(1.0, images / horizon)
    if isinstance(config.schedule, Cooldown):
        shape = min(1.0, (1 - done) / config.schedule.share)
    elif isinstance(config.schedule, Cosine):
        shape = (1 + math.cos(math.pi * done)) / 2
    else:
        shape = 1.0
    return config.lr * warm * shape
