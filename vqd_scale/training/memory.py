"""Memory of a training step on one rank, computed without a device and without the weights."""

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from vqd_scale.diffusion.fused_loss import head_bytes
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.config import ClassCondition, TextCondition, UNetConfig
from vqd_scale.nn.memory import activation_bytes
from vqd_scale.text.clip import build_tower, tower_shape
from vqd_scale.text.config import Pretrained
from vqd_scale.training.tasks.config import AutoregressionConfig, TokenRun

_MASTER_BYTES = 4
"""Bytes of an element of master weights, gradients, moments and EMA, float32."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step's parts on one rank.

    Attributes:
        weights: Weights in the dtype of the computation.
        gradients: Float32 gradients.
        optimizer: Float32 master weights and moments.
        ema: Float32 moving average.
        buckets: Buckets of the gradient reduction.
        activations: Peak of the activations in forward and backward.
        logits: A chunk of the head's logits with their gradient, and the gradient of its weight.
        frozen: Frozen text tower.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    buckets: int
    activations: int
    logits: int
    frozen: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: TokenRun, codes: int, grid: tuple[int, int], images: int, ranks: int = 1
) -> TrainingMemory:
    """Compute the memory of a training step.

    Args:
        config: Run configuration.
        codes: K, the number of codes.
        grid: Height and width in tokens.
        images: Images per rank and micro-batch.
        ranks: Number of ranks that share what the ZeRO stage shards.
    """
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    # The attention of a GPU; "auto" would see tensors on none.
    update = {"attention": "sdpa"}
    network = config.network if isinstance(config, AutoregressionConfig) else config.denoiser
    length, condition = grid[0] * grid[1], network.condition
    shape = None if config.text is None else tower_shape(config.text)

    def build() -> nn.Module:
        if isinstance(config, AutoregressionConfig):
            return Autoregressive(config.network.model_copy(update=update), codes, grid).to(dtype)
        denoiser = config.denoiser
        if not isinstance(denoiser, UNetConfig):
            denoiser = denoiser.model_copy(update=update)
        return cast(nn.Module, denoiser.build(codes, grid, config.diffusion.steps)).to(dtype)

    def run(module: nn.Module) -> Tensor:
        ids = torch.zeros(images, dtype=torch.int64)
        features: Tensor | None = None
        if isinstance(condition, TextCondition) and shape is not None:
            features = torch.zeros(images, shape.context_length, shape.width, dtype=dtype)
        if isinstance(condition, ClassCondition):
            features = ids
        times = () if isinstance(config, AutoregressionConfig) else (ids,)
        return module(ids[:, None].expand(-1, length), *times, features, _sum_of)

    with torch.device("meta"):
        trained = _elements(build())
        tower = 0 if shape is None else _elements(build_tower(shape))
    activations = activation_bytes(build, run)
    is_frozen = isinstance(config.text, Pretrained) and not config.text.train
    if shape is not None and not is_frozen:
        trained += tower
        ids = torch.zeros(images, shape.context_length, dtype=torch.int64, device="meta")
        activations += activation_bytes(
            lambda: build_tower(shape).to(dtype), lambda module: module(ids).sum()
        )
    stage = config.engine.zero.stage
    masters = trained * _MASTER_BYTES // ranks
    return TrainingMemory(
        weights=trained * dtype.itemsize // (ranks if stage == 3 else 1),
        gradients=masters if stage > 1 else trained * _MASTER_BYTES,
        optimizer=masters * (1 + len(config.optim.moments)),
        ema=masters,
        buckets=config.engine.bucket_size * dtype.itemsize,
        activations=activations,
        logits=head_bytes(images * length, codes, network.width, dtype),
        frozen=tower * _MASTER_BYTES if is_frozen else 0,
    )


def _sum_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    del weight, bias
    return hidden.sum()


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
