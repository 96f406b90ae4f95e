"""Training by plain PyTorch: one process, one optimizer, full tensors, no engine."""

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from vqd_scale.core.world import World
from vqd_scale.data.loading.stream import Stream
from vqd_scale.training.optim import LearningRate, build_optimizer
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask


class SingleRankWorld(World):
    """A single rank without a process group."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class PlainRun:
    """Result of a run.

    Attributes:
        losses: Loss of every batch.
        weights: Weights at the end.
        average: EMA of the weights at the end.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


def train_plainly(config: TrainConfig) -> PlainRun:
    """Train as the loop does, without samples that are left out."""
    batch = config.data.global_batch_size
    task = DenoisingTask(config, SingleRankWorld(0, 1, torch.device("cpu")))
    optimizer = build_optimizer(task.module, config.optim)
    for group in optimizer.param_groups:
        # The engine's AdamW is fused; this one is the formula, operation by operation.
        group["fused"] = False
    rate = LearningRate(config.optim, batch, config.total_images)
    average = {name: tensor.detach().clone() for name, tensor in task.module.named_parameters()}
    quarantine = config.run / "quarantine-plain.jsonl"
    stream = Stream(config.data, task.samples(), seed=0, rank=0, ranks=1, cursor=0, quarantine=quarantine)
    losses: list[float] = []
    with closing(iter(stream)) as batches:
        for images in range(0, config.total_images, batch):
            loss = task.losses(task.module, next(batches), images).per_sample.mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.module.parameters(), config.optim.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = rate.at(images)
            optimizer.step()
            task.on_step_end(images + batch)
            half_life = min(config.ema.half_life_images, config.ema.warmup_ratio * (images + batch))
            for name, parameter in task.module.named_parameters():
                average[name].lerp_(parameter.detach(), 1 - 0.5 ** (batch / half_life))
    weights = {name: tensor.detach() for name, tensor in task.module.named_parameters()}
    return PlainRun(losses, weights, average)
