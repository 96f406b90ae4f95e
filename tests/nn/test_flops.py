from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.config import AttentionBackend, AutoregressiveConfig, DenoiserConfig, UNetConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.flops import Cost, cost_of, forward_flops, peak_flops
from vqd_scale.nn.unet import UNet

META = torch.device("meta")


def tokens(length: int) -> Tensor:
    return torch.zeros(1, length, dtype=torch.int64, device=META)


TIME = torch.zeros(1, dtype=torch.int64, device=META)
TEXT = torch.zeros(1, 77, 512, device=META)


def test_convolution_and_matrix_product_counts() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 16, 7))
    assert cost_of(network, torch.zeros(2, 3, 4, 4)) == Cost(
        parameters=3 * 5 * 9 + 80 * 7 + 7, multiply_accumulates=2 * (16 * 3 * 5 * 9 + 80 * 7)
    )


def by_hand(width: int, layers: int, codes: int) -> int:
    """Return the multiply-accumulates of a text-conditional denoiser of 32x32 tokens."""
    length, text = 1024, 77
    attends = 4 * length * width**2 + 2 * length**2 * width
    reads = 2 * length * width**2 + 2 * text * 512 * width + 2 * length * text * width
    modulation = 2 * 2 * width**2
    block = attends + reads + 8 * length * width**2 + modulation
    return layers * block + length * width * codes


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_denoiser_b_count_equals_manual_count(backend: AttentionBackend) -> None:
    with META:
        denoiser = Denoiser(DenoiserConfig(attention=backend), codes=2887, grid=(32, 32), steps=100)
    cost = cost_of(denoiser, tokens(1024), TIME, TEXT)
    assert cost.parameters == 388_780_871
    assert cost.multiply_accumulates == by_hand(width=1024, layers=19, codes=2887)


def test_published_unet_count_is_near_its_paper() -> None:
    """The paper states 117M parameters and 1.06 G multiply-accumulates."""
    with META:
        unet = UNet(UNetConfig(), codes=1024, grid=(16, 16), steps=4000)
    cost = cost_of(unet, tokens(256), TIME, None)
    assert cost.parameters / 1e6 == pytest.approx(117.6, abs=0.1)
    assert cost.multiply_accumulates / 1e9 == pytest.approx(1.11, abs=0.01)


def test_autoregressive_image_costs_less_than_one_denoising_step() -> None:
    with META:
        network = Autoregressive(AutoregressiveConfig(), codes=2887, grid=(32, 32))
        denoiser = Denoiser(DenoiserConfig(), codes=2887, grid=(32, 32), steps=100)
    autoregressive_cost = cost_of(network, tokens(1024), TEXT)
    denoiser_cost = cost_of(denoiser, tokens(1024), TIME, TEXT)
    assert (
        denoiser_cost.multiply_accumulates - autoregressive_cost.multiply_accumulates == 19 * 2 * 2 * 1024**2
    )


def test_forward_flops_equal_manual_count() -> None:
    config = DenoiserConfig(size="L")
    flops = forward_flops(
        lambda: Denoiser(config, 4096, (32, 32), 100), 1024, config.condition, 77, timed=True
    )
    assert flops == 2 * by_hand(width=1408, layers=36, codes=4096)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 3060", None)],
)
def test_device_peak_is_the_datasheet_value_or_unknown(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", Mock(return_value=name))
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
