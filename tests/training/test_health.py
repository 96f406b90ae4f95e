import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.ranks import on_ranks, own_seed
from vqd_scale.core.errors import UserError
from vqd_scale.core.signals import HUNG_EXIT_CODE
from vqd_scale.core.world import World
from vqd_scale.training.health import (
    GradientProbe,
    SpikeConfig,
    SpikeGuard,
    check_losses,
    check_weights,
    noise_scale,
    ranks_of_bad_gradient,
    weights_digest,
)

RUN = Path("runs/test")


def test_a_loss_that_is_not_finite_is_named_by_sample_time_and_rank() -> None:
    def run(world: World) -> None:
        losses = torch.tensor([1.0, math.nan, 2.0, math.inf])
        valid = torch.tensor([True, True, True, False])
        if world.rank == 0:
            losses = losses.nan_to_num(0.0, 0.0)
        slots = torch.arange(4) + 40 + 4 * world.rank
        check_losses(RUN, 40, losses, valid, slots, {"t": torch.tensor([3, 7, 1, 2])}, world)

    with pytest.raises(UserError, match=r"1 samples of rank 1 \(slot 45, t 7\) is not finite"):
        on_ranks(2, run)


def test_finite_losses_and_places_of_bad_samples_pass() -> None:
    def run(world: World) -> None:
        losses, valid = torch.tensor([1.0, math.nan]), torch.tensor([True, False])
        check_losses(RUN, 8, losses, valid, torch.arange(2), {}, world)

    on_ranks(2, run)


def test_the_probe_sees_the_norm_of_each_part_of_a_batch() -> None:
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


def test_the_rank_whose_own_gradient_is_bad_is_found() -> None:
    def run(world: World) -> list[int]:
        network = nn.Linear(3, 2)
        probe = GradientProbe(network)
        network(torch.full((1, 3), math.inf if world.rank == 2 else 1.0)).sum().backward()
        return ranks_of_bad_gradient(probe.squared_norm(), world)

    assert on_ranks(3, run) == [[2]] * 3


def test_the_noise_scale_is_that_of_gradients_made_to_have_one() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.full((50,), 0.2)
    deviation, parts, size = 3.0, 8, 16
    small, big, steps = 0.0, 0.0, 2000
    for _ in range(steps):
        noise = torch.randn(parts, 50, generator=generator) * deviation / math.sqrt(size)
        own = gradient + noise
        small += float(own.square().sum(dim=1).mean()) / steps
        big += float(own.mean(dim=0).square().sum()) / steps
    expected = 50 * deviation**2 / float(gradient.square().sum())
    assert noise_scale(small, big, size, parts * size) == pytest.approx(expected, rel=0.1)


def test_of_noise_alone_there_is_no_scale() -> None:
    assert math.isnan(noise_scale(small=8.0, big=0.5, small_batch=1, big_batch=8))


def spikes(guard: SpikeGuard, losses: list[float]) -> list[bool]:
    return [guard.stands_out(loss) for loss in losses]


def test_a_batch_that_stands_out_is_skipped_and_no_mark_for_the_next() -> None:
    guard = SpikeGuard(SpikeConfig(factor=2.0, half_life_images=32, max_consecutive=2), batch=8)
    # So early everything is new.
    assert spikes(guard, [4.0, 100.0, 4.0, 4.0]) == [False] * 4
    calm = SpikeGuard(SpikeConfig(factor=2.0, half_life_images=32, max_consecutive=2), batch=8)
    assert spikes(calm, [4.0] * 6) == [False] * 6
    assert spikes(calm, [9.0, 9.0]) == [True] * 2
    assert not calm.has_had_enough
    assert spikes(calm, [9.0]) == [True]
    assert calm.has_had_enough
    assert spikes(calm, [4.0]) == [False]
    assert not calm.has_had_enough


def test_the_guard_resumes_as_if_it_had_never_stopped() -> None:
    losses = [4.0, 5.0, 3.0, 4.0, 20.0, 4.0, 9.0, 4.0]
    config = SpikeConfig(factor=2.0, half_life_images=24)
    whole, first, second = (SpikeGuard(config, batch=8) for _ in range(3))
    expected = spikes(whole, losses)
    found = spikes(first, losses[:5])
    second.load_state(first.state())
    assert found + spikes(second, losses[5:]) == expected
    assert True in expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_flipped_bit_of_one_rank_is_found_and_named(dtype: torch.dtype) -> None:
    def run(world: World, flip: bool) -> None:
        with own_seed(0):
            network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
        if flip and world.rank == 1:
            bits = list(network.parameters())[2].detach().view(torch.int16)
            bits.flatten()[0] ^= 1
        check_weights(RUN, 80, network, world)

    on_ranks(3, lambda world: run(world, flip=False))
    with pytest.raises(UserError, match=r"weights of rank 1 differ from the others', '1.weight' first"):
        on_ranks(3, lambda world: run(world, flip=True))


def test_the_digest_is_a_number_for_each_parameter() -> None:
    assert weights_digest(nn.Linear(3, 2)).shape == (2,)


HANG = """
import sys, time
from pathlib import Path
from vqd_scale.training.health import Watchdog

def waiting_for_a_rank_that_is_gone():
    time.sleep(60)

with Watchdog(0.5, Path(sys.argv[1])) as watchdog:
    watchdog.beat()
    waiting_for_a_rank_that_is_gone()
"""


def test_a_hang_ends_with_stacks_and_a_code_of_its_own(tmp_path: Path) -> None:
    report = tmp_path / "stacks.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(report)], capture_output=True, text=True, check=False
    )
    assert done.returncode == HUNG_EXIT_CODE
    for text in (done.stderr, report.read_text()):
        assert "nothing has happened for" in text
        assert "waiting_for_a_rank_that_is_gone" in text
