"""The engine over NCCL on one GPU, beside plain PyTorch on the same GPU."""

import pytest
import torch
from benchmarks.step import FusedStep, StepProblem
from torch import nn

from vqd_scale.core.world import join_world
from vqd_scale.nn.config import DenoiserConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.training.config import AdamWConfig, EngineConfig, ZeroConfig
from vqd_scale.training.engine import Engine
from vqd_scale.training.optim import build_optimizer

pytestmark = pytest.mark.gpu
PROBLEM = StepProblem(width=128, layers=3, heads=4, side=16, codes=300, batch=8)
OPTIM = AdamWConfig(lr=1e-3, weight_decay=0.1)
STEPS = 20


def module() -> FusedStep:
    torch.manual_seed(0)
    config = DenoiserConfig(width=PROBLEM.width, layers=PROBLEM.layers, heads=PROBLEM.heads, init_std=0.1)
    grid = (PROBLEM.side, PROBLEM.side)
    return FusedStep(Denoiser(config, PROBLEM.codes, grid, PROBLEM.transition.steps), PROBLEM)


def plain_losses() -> list[float]:
    network = module().cuda()
    optimizer = build_optimizer(network, OPTIM)
    batch = PROBLEM.batch_of(torch.device("cuda"))
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = network(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), OPTIM.gradient_clipping)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def engine_losses(config: EngineConfig) -> list[float]:
    world = join_world()
    engine = Engine(module(), config, OPTIM, PROBLEM.batch, world, Denoiser.units)
    batch = PROBLEM.batch_of(world.device)
    losses: list[float] = []
    for _ in range(STEPS):
        loss = engine(*batch)
        engine.backward(loss)
        assert engine.step(OPTIM.lr)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_over_nccl_equals_plain_adamw(stage: int) -> None:
    config = EngineConfig(
        zero=ZeroConfig.model_validate({"stage": stage}), precision="fp32", param_persistence_threshold=0
    )
    assert engine_losses(config) == pytest.approx(plain_losses(), rel=1e-3)


def test_half_precision_learns_what_full_precision_learns() -> None:
    engine_curve, plain_curve = engine_losses(EngineConfig(precision="bf16")), plain_losses()
    assert engine_curve == pytest.approx(plain_curve, rel=0.05)
    assert engine_curve[-1] < engine_curve[0]


def test_run_is_repeatable() -> None:
    """Repeat a run within this tolerance: the order of gradient sums varies on a GPU."""
    config = EngineConfig(precision="bf16")
    assert engine_losses(config) == pytest.approx(engine_losses(config), rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_run_is_bit_repeatable(precision: str) -> None:
    config = EngineConfig.model_validate({"precision": precision, "deterministic": True})
    try:
        assert engine_losses(config) == engine_losses(config)
    finally:
        torch.use_deterministic_algorithms(mode=False)
