import torch
from torch import nn

from tests.training.rank_threads import on_ranks, own_seed, partition_of
from vqd_scale.core.world import World
from vqd_scale.training.partition import gather


def test_gathered_parameters_equal_unsharded_parameters() -> None:
    def network() -> nn.Module:
        with own_seed(0):
            return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    def run(world: World) -> dict[str, torch.Tensor]:
        partition = partition_of(network(), world)
        return gather(partition, partition.masters, world)

    expected = dict(network().named_parameters())
    for parameters in on_ranks(3, run):
        assert parameters.keys() == expected.keys()
        assert all(torch.equal(parameters[name], parameter) for name, parameter in expected.items())
