import pytest
import torch
from torch import Tensor, nn

from tests.training.rank_threads import on_ranks, own_seed, partition_of
from vqd_scale.core.world import World
from vqd_scale.training.config import EMAConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.partition import gather

CONFIG = EMAConfig(half_life_images=64, warmup_ratio=0.5)
STEPS, BATCH = 100, 8


def network() -> nn.Module:
    with own_seed(0):
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def moved(value: Tensor, step: int) -> Tensor:
    """Return different weights for each step."""
    return value + torch.sin(torch.arange(value.numel()) + step).view(value.shape)


def averaged(world: World) -> dict[str, Tensor]:
    partition = partition_of(network(), world)
    ema = EMA(CONFIG, partition)
    parameters = dict(network().named_parameters())
    for step in range(STEPS):
        for piece in partition.pieces:
            value = moved(parameters[piece.name].detach(), step).flatten()
            partition.view(partition.masters, piece).copy_(value[piece.start : piece.start + piece.length])
        ema.update((step + 1) * BATCH, BATCH)
    return gather(partition, ema.flats, world)


def test_sharded_ema_equals_full_ema() -> None:
    expected = {name: parameter.detach().clone() for name, parameter in network().named_parameters()}
    start = {name: value.clone() for name, value in expected.items()}
    for step in range(STEPS):
        half_life = min(CONFIG.half_life_images, CONFIG.warmup_ratio * (step + 1) * BATCH)
        decay = 0.5 ** (BATCH / half_life)
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * moved(start[name], step)
    for ranks in (1, 2, 3):
        for averages in on_ranks(ranks, averaged):
            # Only trained weights have an EMA; statistics, schedules and frozen weights have none.
            assert averages.keys() == expected.keys()
            for name, value in expected.items():
                assert averages[name].numel() > 0
                torch.testing.assert_close(averages[name], value, rtol=1e-5, atol=1e-6)


def test_ema_weights_swap_in_and_out_bit_equal() -> None:
    def run(world: World) -> None:
        partition = partition_of(network(), world)
        ema = EMA(CONFIG, partition)
        for flat in ema.flats:
            flat.add_(torch.pi)
        weights = [master.detach().clone() for master in partition.masters]
        average = [flat.clone() for flat in ema.flats]
        with pytest.raises(KeyError), ema.in_place_of_weights():
            assert all(map(torch.equal, (m.detach() for m in partition.masters), average))
            raise KeyError
        assert all(map(torch.equal, (m.detach() for m in partition.masters), weights))
        assert all(map(torch.equal, ema.flats, average))

    on_ranks(2, run)


def test_released_decay_equals_half_life() -> None:
    """The published decay, 0.99 every 25 steps of 32 images, as a half-life in images."""
    half_life = 25 * 32 * torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(0.99))
    assert float(half_life) == pytest.approx(55_000, rel=0.01)
