import torch
from torch import nn

from tests.training.ranks import on_ranks, own_seed, partition_of
from vqd_scale.core.world import World
from vqd_scale.training.logging.sample_images import whole_parameters


def test_whole_parameters_are_those_that_were_cut() -> None:
    def network() -> nn.Module:
        with own_seed(0):
            return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    def run(world: World) -> dict[str, torch.Tensor]:
        partition = partition_of(network(), world)
        return whole_parameters(partition, partition.masters, world)

    expected = dict(network().named_parameters())
    for found in on_ranks(3, run):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
