import itertools
import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from tests.training.rank_threads import on_ranks
from vqd_scale.core.world import World
from vqd_scale.training.config import (
    AdamWConfig,
    BatchScaling,
    ConstantRate,
    Cooldown,
    Cosine,
    LionConfig,
    OptimConfig,
    Plateau,
)
from vqd_scale.training.optim import LearningRate, build_optimizer

PARITY = AdamWConfig(
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
        AdamWConfig(lr=2.0, warmup_images=100, schedule=ConstantRate()), batch=1, horizon=1000
    )
    assert rate.at(0) == pytest.approx(0.02)
    assert rate.at(49) == pytest.approx(1.0)
    assert [rate.at(images) for images in range(100, 1001, 50)] == [2.0] * 19


def test_warmup_may_start_above_zero() -> None:
    rate = LearningRate(
        AdamWConfig(lr=2.0, warmup_images=100, warmup_start_lr=1.0, schedule=ConstantRate()), 1, 1000
    )
    assert rate.at(49) == pytest.approx(1.5)
    assert rate.at(99) == 2.0


def test_cooldown_is_linear_to_zero_over_its_fraction() -> None:
    config = AdamWConfig(lr=2.0, schedule=Cooldown(cooldown_fraction=0.5))
    assert rates(config)[:11] == [2.0] * 11
    assert rates(config)[10:] == pytest.approx([2.0 * (1 - part / 10) for part in range(11)])


def test_cosine_falls_from_the_full_rate_to_zero() -> None:
    lr_values = rates(AdamWConfig(lr=2.0, schedule=Cosine()))
    assert lr_values[0] == 2.0
    assert lr_values[10] == pytest.approx(1.0)
    assert lr_values[-1] == pytest.approx(0.0)
    assert lr_values == sorted(lr_values, reverse=True)


@pytest.mark.parametrize(("rule", "expected"), [("linear", 8.0), ("square-root", 4.0)])
def test_lr_scaling_follows_the_batch_size(rule: str, expected: float) -> None:
    scaling = BatchScaling.model_validate({"reference_batch_size": 32, "rule": rule})
    config = AdamWConfig(lr=2.0, lr_scaling=scaling, schedule=ConstantRate())
    assert LearningRate(config, batch=128, horizon=1000).at(0) == expected
    assert LearningRate(config, batch=32, horizon=1000).at(0) == 2.0


def losses(images: int) -> float:
    """Return a loss that falls for a while and then fluctuates."""
    return max(1.0, 3.0 - images / 300) + 0.02 * math.sin(images)


def trace(rate: LearningRate, start: int, end: int, batch: int = 8) -> list[float]:
    lr_values: list[float] = []
    for images in range(start, end, batch):
        lr_values.append(rate.at(images))
        rate.observe(images + batch, losses(images))
    return lr_values


def test_plateau_waits_for_patience_and_halves_to_minimum() -> None:
    lr_values = trace(LearningRate(PARITY, 8, 10_000), 0, 3000)
    assert lr_values[0] == pytest.approx(3e-6, rel=1)
    assert max(lr_values) == 4.5e-4
    falls = [8 * step for step in range(1, len(lr_values)) if lr_values[step] < lr_values[step - 1]]
    assert [lr_values[fall // 8] for fall in falls] == pytest.approx([2.25e-4, 1.125e-4, 1e-4])
    # It fell to 1.0 at 600 images; the last improvement by a tenth came a little before.
    assert 700 < falls[0] < 900
    assert all(later - earlier > 200 for earlier, later in itertools.pairwise(falls))


@pytest.mark.parametrize("stop", [80, 152, 640, 1000])
def test_plateau_resumes_exactly_during_warmup_and_after(stop: int) -> None:
    uninterrupted = trace(LearningRate(PARITY, 8, 10_000), 0, 2000)
    first, second = LearningRate(PARITY, 8, 10_000), LearningRate(PARITY, 8, 10_000)
    resumed = trace(first, 0, stop)
    second.load_state(first.state())
    assert resumed + trace(second, stop, 2000) == uninterrupted


def test_plateau_rate_is_equal_on_ranks_with_different_losses() -> None:
    def run(world: World) -> list[float]:
        rate = LearningRate(PARITY, 8, 10_000)
        lr_values: list[float] = []
        for images in range(0, 2000, 8):
            lr_values.append(rate.at(images))
            loss_and_count = torch.tensor([losses(images) * (1 + world.rank), 1.0])
            total, count = world.sum(loss_and_count).tolist()
            rate.observe(images + 8, total / count)
        return lr_values

    first_rates, second_rates = on_ranks(2, run)
    assert first_rates == second_rates
    assert min(first_rates[100:]) < 4.5e-4


def test_nonfinite_loss_does_not_update_the_plateau() -> None:
    rate = LearningRate(PARITY, 8, 10_000)
    trace(rate, 0, 400)
    before = rate.state()["plateau"].tolist()
    rate.observe(408, math.nan)
    rate.observe(416, math.inf)
    assert rate.state()["plateau"].tolist() == before


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(4, 3), nn.Conv2d(1, 1, 3))


def test_only_matrices_decay() -> None:
    network = module()
    optimizer = build_optimizer(network, AdamWConfig(weight_decay=0.1))
    decayed = list(optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert {id(parameter) for parameter in decayed} == {id(network[0].weight), id(network[3].weight)}
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(every) == len(list(network.parameters()))
    assert all(isinstance(parameter, torch.Tensor) for parameter in every)


def test_reference_preset_decays_all_parameters() -> None:
    (group,) = build_optimizer(module(), PARITY).param_groups
    assert len(group["params"]) == len(list(module().parameters()))
    assert (group["weight_decay"], group["betas"]) == (0.045, (0.9, 0.96))


def test_lion_equals_its_formula() -> None:
    """arXiv 2302.06675, algorithm 2, for groups with and without weight decay."""
    torch.manual_seed(0)
    network = module()
    config = LionConfig(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer = build_optimizer(network, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    parameters = list(network.parameters())
    expected = [parameter.detach().double() for parameter in parameters]
    momenta = [torch.zeros_like(weight) for weight in expected]
    for _ in range(5):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.double()
            direction = (0.8 * momenta[number] + 0.2 * gradient).sign()
            expected[number] -= 1e-2 * (direction + decay[id(parameter)] * expected[number])
            momenta[number] = 0.95 * momenta[number] + 0.05 * gradient
        optimizer.step()
    assert set(decay.values()) == {0.0, 0.1}
    for parameter, weight, momentum in zip(parameters, expected, momenta, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)
        state = optimizer.state[parameter]
        assert set(state) == {"step", *config.moments}
        torch.testing.assert_close(state["exp_avg"].double(), momentum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [({}, AdamWConfig), ({"kind": "lion"}, LionConfig)])
def test_optimizer_is_chosen_by_kind(kind: dict[str, str], expected: type[AdamWConfig | LionConfig]) -> None:
    adapter = TypeAdapter[AdamWConfig | LionConfig](OptimConfig)
    config = adapter.validate_python({"lr": 1e-3, **kind})
    assert type(config) is expected
    assert config.lr == 1e-3
    assert len(build_optimizer(module(), config).param_groups) == 2


def test_trained_parameters_have_one_dtype() -> None:
    """ZeRO stores them in flat tensors; the released null embedding was float64."""
    from vqd_scale.text.clip import TextEncoder
    from vqd_scale.text.config import Tower

    tower = Tower(context_length=8, width=16, heads=2, layers=1, bpe_merges=300)
    encoder = TextEncoder(tower)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    for parameter in encoder.parameters():
        assert parameter.requires_grad
