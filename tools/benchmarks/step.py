"""A full training step against a plain eager implementation, from the same weights on the same batch."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from benchmarks.loss import NaiveObjective
from benchmarks.measuring import extra_peak, in_fresh_process
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.world import join_world
from vqd_scale.diffusion.config import ObjectiveConfig, Released
from vqd_scale.diffusion.objective import Objective
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.nn.config import DenoiserConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.flops import forward_flops, peak_flops
from vqd_scale.nn.layers import GELU2
from vqd_scale.nn.sizes import SIZES, SizeName
from vqd_scale.training.config import AdamWConfig, EngineConfig
from vqd_scale.training.engine import Engine

_TEXT = (77, 512)
_RATE = 1e-4
_SIDES = ("ours", "ours_bf16", "alternative")
Side = Literal["ours", "ours_bf16", "alternative"]
Take = Callable[[], float]


@dataclass(frozen=True)
class StepProblem:
    """Sizes of a network and a batch; defaults: published size S with the fully connected feed-forward."""

    width: int = 192
    layers: int = 18
    heads: int = 16
    side: int = 32
    codes: int = 2887
    batch: int = 4

    @property
    def transition(self) -> MaskAndReplace:
        """Return the released schedule."""
        return MaskAndReplace(Released(), self.codes)

    def batch_of(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, noisy tokens, timesteps and text features of a fixed batch."""
        slots, length = torch.arange(self.batch), self.side**2
        tokens = (uniforms(0, Purpose.EVALUATION, slots, length) * self.codes).long()
        t = torch.linspace(1, 98, self.batch).long()
        noisy = self.transition.corrupt(
            tokens, t, uniforms(0, Purpose.CORRUPTION, slots, length, dtype=torch.float64)
        )
        text = torch.sin(torch.arange(self.batch * _TEXT[0] * _TEXT[1], dtype=torch.float32))
        parts = (tokens, noisy, t, text.view(self.batch, *_TEXT))
        return tuple(part.to(device) for part in parts)  # pyright: ignore[reportReturnType]


LAYER_OF_B = StepProblem(width=1024, layers=1, batch=1)
"""One layer of size B, small enough for a CPU."""


class FusedStep(nn.Module):
    """The network with the objective in place of its head, as in training."""

    def __init__(self, denoiser: Denoiser, problem: StepProblem) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.objective = Objective(problem.transition, ObjectiveConfig())

    def forward(self, tokens: Tensor, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The loss to be differentiated."""
        text = text.to(self.denoiser.head.weight.dtype)

        def head_function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return self.objective(hidden, weight, bias, tokens, noisy, t).loss_per_image

        return self.denoiser(noisy, t, text, head_function).mean()


class NaiveGELU2(nn.Module):
    """The activation by its formula, with the saved tensors of each operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise."""
        return x * torch.sigmoid(1.702 * x)


class NaiveStep(nn.Module):
    """Logits of the full batch, stored attention weights, and the log-one-hot objective."""

    def __init__(self, denoiser: Denoiser, problem: StepProblem) -> None:
        super().__init__()
        for module in list(denoiser.modules()):
            for name, child in module.named_children():
                if isinstance(child, GELU2):
                    setattr(module, name, NaiveGELU2())
        self.denoiser = denoiser
        self.objective = NaiveObjective(problem.transition, ObjectiveConfig())

    def forward(self, tokens: Tensor, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The loss to be differentiated."""
        return self.objective(self.denoiser(noisy, t, text).transpose(1, 2), tokens, noisy, t).mean()


def step_of(side: Side, problem: StepProblem) -> Take:
    """Return a function that takes one training step (forward, backward, clipping, AdamW)."""
    torch.manual_seed(0)
    backend = "reference" if side == "alternative" else "auto"
    config = DenoiserConfig(
        width=problem.width, layers=problem.layers, heads=problem.heads, attention=backend
    )
    denoiser = Denoiser(config, problem.codes, (problem.side, problem.side), problem.transition.steps)
    if side == "alternative":
        return _plain_step(NaiveStep(denoiser, problem), problem)
    return _engine_step(FusedStep(denoiser, problem), problem, "fp32" if side == "ours" else "bf16")


def _plain_step(module: nn.Module, problem: StepProblem) -> Take:
    optimizer = torch.optim.AdamW(module.parameters(), lr=_RATE)
    batch = problem.batch_of(torch.device("cpu"))

    def take() -> float:
        optimizer.zero_grad()
        loss = module(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return take


def _engine_step(module: FusedStep, problem: StepProblem, precision: Literal["fp32", "bf16"]) -> Take:
    world = join_world()
    engine = Engine(
        module, EngineConfig(precision=precision), AdamWConfig(), problem.batch, world, Denoiser.units
    )
    batch = problem.batch_of(world.device)

    def take() -> float:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step(_RATE)
        return float(loss.detach())

    return take


def benchmark_step(rounds: int, problem: StepProblem | None = None) -> dict[str, Any]:
    """Measure a training step in float32 and bfloat16 against the naive one in float32, on a CPU.

    Args:
        rounds: Number of timings per side, in turn; medians are reported. The first step is not timed.
        problem: Sizes of the benchmark.

    Raises:
        AssertionError: The sides compute different losses.
    """
    problem = StepProblem() if problem is None else problem
    if torch.cuda.is_available():
        return {"sizes": {size: gpu_step(size, rounds) for size in ("S", "B", "L")}}
    memory = {side: in_fresh_process(partial(extra_peak_bytes, side, problem)) for side in _SIDES}
    steps = {side: step_of(side, problem) for side in _SIDES}
    losses = {side: step() for side, step in steps.items()}
    torch.testing.assert_close(losses["ours"], losses["alternative"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["ours_bf16"], losses["alternative"], rtol=0.02, atol=0)
    seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
    for _ in progress(range(rounds), "step", rounds):
        for side, step in steps.items():
            gc.collect()
            began = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - began)
    medians = {side: median(values) for side, values in seconds.items()}
    return {
        **medians,
        "ratio": medians["alternative"] / medians["ours"],
        "ratio_bf16": medians["alternative"] / medians["ours_bf16"],
        "memory_ratio": memory["ours"] / memory["alternative"],
        "memory_ratio_bf16": memory["ours_bf16"] / memory["alternative"],
        "extra_peak_megabytes": {side: round(value / 1e6, 1) for side, value in memory.items()},
        "seconds": {side: [round(value, 3) for value in values] for side, values in seconds.items()},
        "losses": losses,
        "problem": vars(problem),
    }


def benchmark_layer(rounds: int) -> dict[str, Any]:
    """`benchmark_step` of one layer of size B, with embedding and head, on a CPU.

    Raises:
        UserError: There is a GPU, where `benchmark_step` measures whole networks.
    """
    if torch.cuda.is_available():
        raise UserError("benchmark layer: it is for CPUs; on a GPU `step` measures all sizes.")
    return benchmark_step(rounds, LAYER_OF_B)


def extra_peak_bytes(side: Side, problem: StepProblem) -> int:
    """Return the increase of resident memory in a step over model, optimizer state and batch."""
    step = step_of(side, problem)
    step()
    return extra_peak(step)


def gpu_step(size: SizeName, rounds: int) -> dict[str, float]:
    """Measure images per second, model FLOPs utilization and peak memory on one GPU in bfloat16."""
    published = SIZES[size]
    config = DenoiserConfig.model_validate(dict(published.shape) | {"feed_forward": {"kind": "fc"}})
    problem = StepProblem(config.width, config.layers, config.heads, published.grid[0], published.codes, 16)
    steps = problem.transition.steps
    forward = forward_flops(
        lambda: Denoiser(config, problem.codes, published.grid, steps),
        problem.side**2,
        config.condition,
        _TEXT[0],
        timed=True,
    )
    torch.cuda.reset_peak_memory_stats()
    step = step_of("ours_bf16", problem)
    for _ in range(3):
        step()
    seconds: list[float] = []
    for _ in range(max(rounds, 10)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    per_second = problem.batch / median(seconds)
    figures = {
        "images_per_second": per_second,
        "peak_memory_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }
    peak = peak_flops(torch.device("cuda"))
    # Backward costs twice forward; recomputation for gradient checkpointing does not count.
    return figures | ({"model_flops_utilization": 3 * forward * per_second / peak} if peak else {})
