import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.rank_threads import on_ranks, own_seed
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.config import HealthConfig, SpikeConfig
from vqd_scale.training.health import (
    GradientProbe,
    HealthMonitor,
    SpikeDetector,
    noise_scale,
    weights_digest,
)

RUN, BATCH = Path("runs/test"), 8


def monitor_of(world: World, module: nn.Module | None = None, **config: Any) -> HealthMonitor:
    return HealthMonitor(
        HealthConfig.model_validate(config), RUN, BATCH, 1e-3, module or nn.Identity(), world
    )


def test_nonfinite_loss_names_sample_time_and_rank() -> None:
    def run(world: World) -> None:
        losses = torch.tensor([1.0, math.nan, 2.0, math.inf])
        valid = torch.tensor([True, True, True, False])
        if world.rank == 0:
            losses = losses.nan_to_num(0.0, 0.0)
        slots = torch.arange(4) + 40 + 4 * world.rank
        monitor_of(world).check_losses(40, losses, valid, slots, {"t": torch.tensor([3, 7, 1, 2])})

    with pytest.raises(UserError, match=r"1 samples of rank 1 \(slot 45, t 7\) is not finite"):
        on_ranks(2, run)


def test_finite_losses_and_bad_sample_slots_pass() -> None:
    def run(world: World) -> None:
        losses, valid = torch.tensor([1.0, math.nan]), torch.tensor([True, False])
        monitor_of(world).check_losses(8, losses, valid, torch.arange(2), {})

    on_ranks(2, run)


def test_probe_sums_gradient_norms_of_microbatches() -> None:
    network = nn.Linear(3, 2)
    probe = GradientProbe(network)
    assert probe.squared_norm() == 0
    expected = 0.0
    for part in torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0)):
        network.zero_grad()
        network(part).square().sum().backward()
        grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        expected += sum(float(grad.square().sum()) for grad in grads)
    assert float(probe.squared_norm()) == pytest.approx(expected, rel=1e-5)
    assert probe.squared_norm() == 0


def skip_nonfinite_gradient(world: World, times: int = 1, **config: Any) -> HealthMonitor:
    """Skip batches whose gradient is infinite on the last rank."""
    network = nn.Linear(3, 2)
    monitor = monitor_of(world, network, **config)
    slots = torch.arange(4) + 4 * world.rank
    for step in range(times):
        network(torch.full((1, 3), math.inf if world.rank == world.size - 1 else 1.0)).sum().backward()
        monitor.skip_nonfinite_gradient(8 * step, slots, monitor.probe.squared_norm())
    return monitor


def test_nonfinite_gradient_stops_the_run_and_names_the_rank() -> None:
    with pytest.raises(UserError, match=r"after 0 images the gradient of rank 2 \(slots 8 to 11\) is not"):
        on_ranks(3, skip_nonfinite_gradient)


def test_nonfinite_gradients_are_skipped_up_to_a_number_in_a_row() -> None:
    allowed = {"nonfinite_gradient": "skip", "max_consecutive_nonfinite": 2}

    def run(world: World, *, with_step: bool) -> int:
        monitor = skip_nonfinite_gradient(world, times=2, **allowed)
        if with_step:
            monitor.on_applied_step()
        monitor.skip_nonfinite_gradient(16, torch.arange(4), torch.tensor(math.nan))
        return monitor.skipped_batches

    assert on_ranks(2, lambda world: run(world, with_step=True)) == [3, 3]
    with pytest.raises(UserError, match="after 16 images the gradient of rank 0"):
        on_ranks(2, lambda world: run(world, with_step=False))


def test_noise_scale_equals_constructed_noise_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.full((50,), 0.2)
    deviation, parts, size = 3.0, 8, 16
    small, big, steps = 0.0, 0.0, 2000
    for _ in range(steps):
        noise = torch.randn(parts, 50, generator=generator) * deviation / math.sqrt(size)
        rank_gradients = gradient + noise
        small += float(rank_gradients.square().sum(dim=1).mean()) / steps
        big += float(rank_gradients.mean(dim=0).square().sum()) / steps
    expected = 50 * deviation**2 / float(gradient.square().sum())
    assert noise_scale(small, big, size, parts * size) == pytest.approx(expected, rel=0.1)


def test_noise_scale_of_pure_noise_is_nan() -> None:
    assert math.isnan(noise_scale(small=8.0, big=0.5, small_batch=1, big_batch=8))


def spikes(detector: SpikeDetector, losses: list[float]) -> list[bool]:
    return [detector.is_spike(loss) for loss in losses]


def test_spike_is_excluded_from_the_baseline() -> None:
    config = SpikeConfig(factor=2.0, half_life_images=32)
    # No batch is a spike before the average exists.
    assert spikes(SpikeDetector(config, BATCH), [4.0, 100.0, 4.0, 4.0]) == [False] * 4
    detector = SpikeDetector(config, BATCH)
    assert spikes(detector, [4.0] * 6) == [False] * 6
    assert spikes(detector, [9.0] * 3) == [True] * 3
    assert detector.consecutive == 3
    assert spikes(detector, [4.0]) == [False]
    assert detector.consecutive == 0


def test_spike_detector_resumes_exactly() -> None:
    losses = [4.0, 5.0, 3.0, 4.0, 20.0, 4.0, 9.0, 4.0]
    config = SpikeConfig(factor=2.0, half_life_images=24)
    uninterrupted, first, second = (SpikeDetector(config, BATCH) for _ in range(3))
    expected = spikes(uninterrupted, losses)
    first_verdicts = spikes(first, losses[:5])
    second.load_state(first.state())
    assert first_verdicts + spikes(second, losses[5:]) == expected
    assert True in expected


class Rewinds:
    """Checkpoints to rewind to: one at a number of images, or none."""

    def __init__(self, images: int | None) -> None:
        self.images = images
        self.requested: list[int] = []

    def __call__(self, before: int) -> int | None:
        self.requested.append(before)
        return self.images


def skip_spikes(rewinds: Rewinds, count: int, **spike: Any) -> HealthMonitor:
    """Skip a number of spikes in a row, after eight other batches."""
    spike = {"factor": 2.0, "half_life_images": 32, "max_consecutive": 1, **spike}
    monitor = monitor_of(World(0, 1, torch.device("cpu")), spike=spike)
    for step in range(8 + count):
        loss = 4.0 if step < 8 else 9.0
        if monitor.is_spike(loss):
            monitor.skip_spike(BATCH * step, loss, rewinds)
    return monitor


def test_spikes_are_counted_and_then_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    assert skip_spikes(Rewinds(None), 1).skipped_batches == 1
    assert "after 64 images a batch's loss of 9 is a spike; the batch is skipped" in caplog.text
    with pytest.raises(UserError, match=r"after 72 images .* number 2 in a row; .* optim.lr=0.0005"):
        skip_spikes(Rewinds(None), 2)


def test_spikes_rewind_to_before_the_first_and_once_per_checkpoint() -> None:
    rewinds = Rewinds(40)
    assert skip_spikes(rewinds, 2, rewind=True).skipped_batches == 2
    assert rewinds.requested == [64]
    for unhelpful, count in ((Rewinds(None), 2), (Rewinds(40), 3)):
        with pytest.raises(UserError, match="rewinding to the last checkpoint did not help"):
            skip_spikes(unhelpful, count, rewind=True)


def test_without_spike_configuration_no_loss_is_a_spike() -> None:
    monitor = monitor_of(World(0, 1, torch.device("cpu")))
    assert not any(monitor.is_spike(loss) for loss in (1.0, 1.0, 1e9))
    assert monitor.state() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flipped_bit_of_one_rank_is_detected_and_named(dtype: torch.dtype) -> None:
    def run(world: World, flip: bool) -> None:
        with own_seed(0):
            network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
        if flip and world.rank == 1:
            bits = list(network.parameters())[2].detach().view(torch.int16)
            bits.flatten()[0] ^= 1
        monitor_of(world).check_replicas(80, network)

    on_ranks(3, lambda world: run(world, flip=False))
    with pytest.raises(UserError, match=r"weights of rank 1 differ from the others', '1.weight' first"):
        on_ranks(3, lambda world: run(world, flip=True))


def test_digest_has_one_number_per_parameter() -> None:
    assert weights_digest(nn.Linear(3, 2)).shape == (2,)
