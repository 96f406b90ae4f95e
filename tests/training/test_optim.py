import pytest
import torch
from torch import nn

from vqd_scale.training.optim import Constant, Cooldown, Cosine, OptimConfig, build_optimizer, learning_rate


def rates(config: OptimConfig, horizon: int = 1000, step: int = 50) -> list[float]:
    return [learning_rate(config, images, horizon) for images in range(0, horizon + 1, step)]


def test_constant_after_warmup() -> None:
    config = OptimConfig(lr=2.0, warmup=100, schedule=Constant())
    assert learning_rate(config, 0, 1000) == pytest.approx(0.02)
    assert learning_rate(config, 49, 1000) == pytest.approx(1.0)
    assert rates(config)[2:] == [2.0] * 19


def test_cooldown_is_a_straight_line_to_zero_over_its_share() -> None:
    config = OptimConfig(lr=2.0, schedule=Cooldown(share=0.5))
    assert rates(config)[:11] == [2.0] * 11
    assert rates(config)[10:] == pytest.approx([2.0 * (1 - part / 10) for part in range(11)])


def test_cosine_falls_from_the_full_rate_to_zero() -> None:
    found = rates(OptimConfig(lr=2.0, schedule=Cosine()))
    assert found[0] == 2.0
    assert found[10] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.0)
    assert found == sorted(found, reverse=True)


def test_trap_26_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(4, 3), nn.Conv2d(1, 1, 3))
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.1))
    decayed = list(optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert {id(parameter) for parameter in decayed} == {id(module[0].weight), id(module[3].weight)}
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(every) == len(list(module.parameters()))
    assert all(isinstance(parameter, torch.Tensor) for parameter in every)
