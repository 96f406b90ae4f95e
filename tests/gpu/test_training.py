"""The engine over NCCL on one GPU, beside plain PyTorch on the same GPU."""

import pytest
import torch
from benchmarks.step import FusedStep, StepProblem
from torch import nn

from vqd_scale.core.world import join_world
from vqd_scale.nn.denoiser import Denoiser, DenoiserConfig
from vqd_scale.training.engine import Engine, EngineConfig, ZeroConfig
from vqd_scale.training.optim import OptimConfig, build_optimizer

pytestmark = pytest.mark.gpu
PROBLEM = StepProblem(width=128, layers=3, heads=4, side=16, codes=300, batch=8)
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1)
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
    found: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = network(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), OPTIM.gradient_clipping)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def engine_losses(config: EngineConfig) -> list[float]:
    world = join_world()
    engine = Engine(module(), config, OPTIM, PROBLEM.batch, world, Denoiser.units)
    batch = PROBLEM.batch_of(world.device)
    found: list[float] = []
    for _ in range(STEPS):
        loss = engine(*batch)
        engine.backward(loss)
        assert engine.step(OPTIM.lr)
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_over_nccl_is_plain_adamw(stage: int) -> None:
    config = EngineConfig(
        zero=ZeroConfig.model_validate({"stage": stage}), precision="fp32", param_persistence_threshold=0
    )
    assert engine_losses(config) == pytest.approx(plain_losses(), rel=1e-3)


def test_half_precision_learns_what_full_precision_learns() -> None:
    found, expected = engine_losses(EngineConfig(precision="bf16")), plain_losses()
    assert found == pytest.approx(expected, rel=0.05)
    assert found[-1] < found[0]


def test_one_run_repeats_itself() -> None:
    """On a GPU to this tolerance: sums of gradients are added in whatever order threads come."""
    config = EngineConfig(precision="bf16")
    assert engine_losses(config) == pytest.approx(engine_losses(config), rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_asked_for_a_run_repeats_itself_bit_for_bit(precision: str) -> None:
    config = EngineConfig.model_validate({"precision": precision, "deterministic": True})
    try:
        assert engine_losses(config) == engine_losses(config)
    finally:
        torch.use_deterministic_algorithms(mode=False)
