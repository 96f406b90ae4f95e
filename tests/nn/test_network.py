"""The network protocol, tested on every network."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from vqd_scale.core.config import Config, load_config
from vqd_scale.core.errors import UserError
from vqd_scale.nn.config import ClassCondition, DenoiserConfig, NetworkConfig, UNetConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.layers import init_from_codebook
from vqd_scale.nn.unet import UNet

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
def test_prepared_network_equals_plain_forward(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = config.build(CODES, GRID, STEPS)
    tokens = torch.randint(0, CODES + 1, (4, 24))
    labels = torch.arange(4)
    for t in (0, STEPS - 1):
        expected = network(tokens, torch.full((4,), t), labels)
        torch.testing.assert_close(network.prepare(labels)(tokens, t), expected, atol=1e-5, rtol=1e-5)


@each_network
def test_logits_depend_on_time_condition_and_tokens(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = config.build(CODES, GRID, STEPS)
    tokens, t, labels = torch.randint(0, CODES, (1, 24)), torch.tensor([3]), torch.tensor([0])
    logits = network(tokens, t, labels)
    for changed_inputs in ((tokens, t + 1, labels), (tokens, t, labels + 1), (tokens, t, labels + 3)):
        assert not torch.allclose(network(*changed_inputs), logits)
    masked = tokens.clone()
    masked[0, 5] = CODES
    assert not torch.allclose(network(masked, t, labels), logits)


@each_network
def test_head_consumer_receives_inputs_of_the_logits(config: NetworkConfig) -> None:
    torch.manual_seed(0)
    network = config.build(CODES, GRID, STEPS)
    tokens, t, labels = torch.randint(0, CODES + 1, (2, 24)), torch.tensor([3, 8]), torch.tensor([0, 3])
    logits = network(tokens, t, labels)
    assert logits.shape == (2, 24, CODES)
    torch.testing.assert_close(network(tokens, t, labels, functional.linear), logits)


@each_network
def test_token_embedding_may_start_from_a_codebook(config: NetworkConfig) -> None:
    network = config.build(CODES, GRID, STEPS)
    before = network(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    init_from_codebook(network.code_embeddings, torch.randn(CODES, 4), std=0.5)
    assert [len(table) for table in network.code_embeddings] == [CODES + 1, CODES]
    after = network(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    assert not torch.allclose(before, after)


@each_network
def test_unit_inputs_require_gradients(config: NetworkConfig) -> None:
    """Otherwise the engine would consider a unit's gradients complete too early."""
    network = config.build(CODES, GRID, STEPS)
    assert isinstance(network, nn.Module)
    requires_grad: list[bool] = []
    for module in network.modules():
        if isinstance(module, network.units):
            module.register_forward_pre_hook(lambda _, inputs: requires_grad.append(inputs[0].requires_grad))
    network(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]))
    assert requires_grad
    assert all(requires_grad)


def test_kind_selects_network_and_defaults_to_transformer() -> None:
    assert load_config(Run, None, ["denoiser.layers=3"]).denoiser == DenoiserConfig(layers=3)
    config = load_config(Run, None, ["denoiser.kind=unet", "denoiser.width=8"]).denoiser
    assert config == UNetConfig(width=8)
    assert isinstance(config.build(CODES, (8, 8), STEPS), UNet)
    small = load_config(Run, None, ["denoiser.layers=1", "denoiser.width=16"]).denoiser
    assert isinstance(small.build(CODES, GRID, STEPS), Denoiser)
    with pytest.raises(UserError, match=r"denoiser\.kind: given 'vit', allowed: 'transformer', 'unet'"):
        load_config(Run, None, ["denoiser.kind=vit"])
