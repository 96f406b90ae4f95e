"""What is asked of every network, asked of each of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from vqd_scale.core.config import Config, load_config
from vqd_scale.core.errors import UserError
from vqd_scale.nn.denoiser import ClassCondition, Denoiser, DenoiserConfig
from vqd_scale.nn.layers import start_from_codebook
from vqd_scale.nn.network import NetworkConfig, build_network
from vqd_scale.nn.unet import UNet, UNetConfig

CODES, GRID, STEPS = 7, (4, 6), 9
CLASSES = ClassCondition(classes=3)
NETWORKS: list[NetworkConfig] = [
    DenoiserConfig(width=24, layers=2, heads=2, init_std=0.3, condition=CLASSES),
    UNetConfig(width=16, channel_multipliers=(1, 2), condition=CLASSES),
]
each_network = pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)


class Run(Config):
    denoiser: NetworkConfig = DenoiserConfig()


@each_network
def test_prepared_for_a_condition_it_says_the_same(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = build_network(config, CODES, GRID, STEPS)
    tokens = torch.randint(0, CODES + 1, (4, 24))
    labels = torch.arange(4)
    for t in (0, STEPS - 1):
        expected = network(tokens, torch.full((4,), t), labels)
        torch.testing.assert_close(network.prepared(labels)(tokens, t), expected, atol=1e-5, rtol=1e-5)


@each_network
def test_time_condition_and_tokens_all_matter(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = build_network(config, CODES, GRID, STEPS)
    tokens, t, labels = torch.randint(0, CODES, (1, 24)), torch.tensor([3]), torch.tensor([0])
    logits = network(tokens, t, labels)
    for others in ((tokens, t + 1, labels), (tokens, t, labels + 1), (tokens, t, labels + 3)):
        assert not torch.allclose(network(*others), logits)
    masked = tokens.clone()
    masked[0, 5] = CODES
    assert not torch.allclose(network(masked, t, labels), logits)


@each_network
def test_what_consumes_the_head_gets_what_makes_the_logits(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = build_network(config, CODES, GRID, STEPS)
    tokens, t, labels = torch.randint(0, CODES + 1, (2, 24)), torch.tensor([3, 8]), torch.tensor([0, 3])
    logits = network(tokens, t, labels)
    assert logits.shape == (2, 24, CODES)
    torch.testing.assert_close(network(tokens, t, labels, functional.linear), logits)


@each_network
def test_its_codes_may_start_from_a_codebook(config: NetworkConfig) -> None:
    network = build_network(config, CODES, GRID, STEPS)
    before = network(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    start_from_codebook(network.code_tables, torch.randn(CODES, 4), deviation=0.5)
    assert [len(table) for table in network.code_tables] == [CODES + 1, CODES]
    after = network(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    assert not torch.allclose(before, after)


@each_network
def test_a_units_inputs_require_gradients(config: NetworkConfig) -> None:
    """Otherwise the engine would take a unit's gradients to be complete before they are there."""
    network = build_network(config, CODES, GRID, STEPS)
    assert isinstance(network, nn.Module)
    seen: list[bool] = []
    for module in network.modules():
        if isinstance(module, network.units):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    network(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    assert seen
    assert all(seen)


def test_a_network_is_chosen_by_its_kind_and_is_a_transformer_where_none_is_said() -> None:
    assert load_config(Run, None, ["denoiser.layers=3"]).denoiser == DenoiserConfig(layers=3)
    config = load_config(Run, None, ["denoiser.kind=unet", "denoiser.width=8"]).denoiser
    assert config == UNetConfig(width=8)
    assert isinstance(build_network(config, CODES, (8, 8), STEPS), UNet)
    small = load_config(Run, None, ["denoiser.layers=1", "denoiser.width=16"]).denoiser
    assert isinstance(build_network(small, CODES, GRID, STEPS), Denoiser)
    with pytest.raises(UserError, match=r"denoiser\.kind: given 'vit', allowed: 'transformer', 'unet'"):
        load_config(Run, None, ["denoiser.kind=vit"])
