import itertools
import math

import pytest
import torch
from torch import nn

from tests.training.ranks import on_ranks
from vqd_scale.core.world import World
from vqd_scale.training.optim import (
    BatchScaling,
    ConstantRate,
    Cooldown,
    Cosine,
    LearningRate,
    OptimConfig,
    Plateau,
    build_optimizer,
)

PARITY = OptimConfig(
    lr=4.5e-4,
    betas=(0.9, 0.96),
    weight_decay=0.045,
    weight_decay_on="everything",
    gradient_clipping=0.5,
    warmup_images=160,
    warmup_start_lr=3e-6,
    schedule=Plateau(patience_images=200, threshold=0.1, smoothing_images=8, minimum=1e-4),
)


def rates(config: OptimConfig, horizon: int = 1000, step: int = 50) -> list[float]:
    rate = LearningRate(config, batch=1, horizon=horizon)
    return [rate.at(images) for images in range(0, horizon + 1, step)]


def test_constant_after_warmup() -> None:
    rate = LearningRate(
        OptimConfig(lr=2.0, warmup_images=100, schedule=ConstantRate()), batch=1, horizon=1000
    )
    assert rate.at(0) == pytest.approx(0.02)
    assert rate.at(49) == pytest.approx(1.0)
    assert [rate.at(images) for images in range(100, 1001, 50)] == [2.0] * 19


def test_warmup_may_start_above_zero() -> None:
    rate = LearningRate(
        OptimConfig(lr=2.0, warmup_images=100, warmup_start_lr=1.0, schedule=ConstantRate()), 1, 1000
    )
    assert rate.at(49) == pytest.approx(1.5)
    assert rate.at(99) == 2.0


def test_cooldown_is_a_straight_line_to_zero_over_its_share() -> None:
    config = OptimConfig(lr=2.0, schedule=Cooldown(cooldown_fraction=0.5))
    assert rates(config)[:11] == [2.0] * 11
    assert rates(config)[10:] == pytest.approx([2.0 * (1 - part / 10) for part in range(11)])


def test_cosine_falls_from_the_full_rate_to_zero() -> None:
    found = rates(OptimConfig(lr=2.0, schedule=Cosine()))
    assert found[0] == 2.0
    assert found[10] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.0)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(("rule", "expected"), [("linear", 8.0), ("square-root", 4.0)])
def test_the_rate_follows_the_batch_by_the_rule_of_the_recipe(rule: str, expected: float) -> None:
    scaling = BatchScaling.model_validate({"reference_batch_size": 32, "rule": rule})
    config = OptimConfig(lr=2.0, lr_scaling=scaling, schedule=ConstantRate())
    assert LearningRate(config, batch=128, horizon=1000).at(0) == expected
    assert LearningRate(config, batch=32, horizon=1000).at(0) == 2.0


def losses(images: int) -> float:
    """A loss that falls for a while and then only trembles."""
    return max(1.0, 3.0 - images / 300) + 0.02 * math.sin(images)


def trace(rate: LearningRate, start: int, end: int, batch: int = 8) -> list[float]:
    found: list[float] = []
    for images in range(start, end, batch):
        found.append(rate.at(images))
        rate.observe(images + batch, losses(images))
    return found


def test_trap_27_plateau_waits_for_its_patience_and_halves_down_to_the_minimum() -> None:
    found = trace(LearningRate(PARITY, 8, 10_000), 0, 3000)
    assert found[0] == pytest.approx(3e-6, rel=1)
    assert max(found) == 4.5e-4
    falls = [8 * step for step in range(1, len(found)) if found[step] < found[step - 1]]
    assert [found[fall // 8] for fall in falls] == pytest.approx([2.25e-4, 1.125e-4, 1e-4])
    # It fell to 1.0 at 600 images; the last improvement by a tenth came a little before.
    assert 700 < falls[0] < 900
    assert all(later - earlier > 200 for earlier, later in itertools.pairwise(falls))


@pytest.mark.parametrize("stop", [80, 152, 640, 1000])
def test_trap_27_resumed_anywhere_even_while_warming_up_it_goes_on_alike(stop: int) -> None:
    whole = trace(LearningRate(PARITY, 8, 10_000), 0, 2000)
    first, second = LearningRate(PARITY, 8, 10_000), LearningRate(PARITY, 8, 10_000)
    resumed = trace(first, 0, stop)
    second.load_state(first.state())
    assert resumed + trace(second, stop, 2000) == whole


def test_trap_27_ranks_with_different_losses_have_one_rate() -> None:
    def run(world: World) -> list[float]:
        rate = LearningRate(PARITY, 8, 10_000)
        found: list[float] = []
        for images in range(0, 2000, 8):
            found.append(rate.at(images))
            own = torch.tensor([losses(images) * (1 + world.rank), 1.0])
            total, count = world.sum(own).tolist()
            rate.observe(images + 8, total / count)
        return found

    one, other = on_ranks(2, run)
    assert one == other
    assert min(one[100:]) < 4.5e-4


def test_a_loss_that_is_not_finite_is_no_mark_to_beat() -> None:
    rate = LearningRate(PARITY, 8, 10_000)
    trace(rate, 0, 400)
    before = rate.state()["plateau"].tolist()
    rate.observe(408, math.nan)
    rate.observe(416, math.inf)
    assert rate.state()["plateau"].tolist() == before


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(4, 3), nn.Conv2d(1, 1, 3))


def test_trap_26_only_matrices_decay() -> None:
    network = module()
    optimizer = build_optimizer(network, OptimConfig(weight_decay=0.1))
    decayed = list(optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert {id(parameter) for parameter in decayed} == {id(network[0].weight), id(network[3].weight)}
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(every) == len(list(network.parameters()))
    assert all(isinstance(parameter, torch.Tensor) for parameter in every)


def test_trap_26_in_the_preset_of_the_reference_everything_decays() -> None:
    (group,) = build_optimizer(module(), PARITY).param_groups
    assert len(group["params"]) == len(list(module().parameters()))
    assert (group["weight_decay"], group["betas"]) == (0.045, (0.9, 0.96))


def test_trap_29_all_trained_parameters_have_one_type() -> None:
    """ZeRO lays them in flat tensors; the released null embedding was float64."""
    from vqd_scale.text.clip import TextEncoder, Tower

    tower = Tower(context_length=8, width=16, heads=2, layers=1, bpe_merges=300)
    encoder = TextEncoder(tower)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    for parameter in encoder.parameters():
        assert parameter.requires_grad
