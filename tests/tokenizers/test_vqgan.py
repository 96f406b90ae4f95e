import pytest
import torch
from pydantic import ValidationError

from vqd_scale.tokenizers.base import ImageTokenizer, to_bytes, to_signal
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

CONFIGS = [
    VQGANConfig(codes=5, code_width=3, channels=8, multipliers=(1, 2), residual_blocks=1, norm="none"),
    VQGANConfig(codes=5, code_width=3, channels=8, multipliers=(1,), residual_blocks=1, patch=4, norm="none"),
    VQGANConfig(codes=5, code_width=3, channels=32, multipliers=(1, 1, 2), residual_blocks=2),
]


def build(config: VQGANConfig) -> VQGAN:
    torch.manual_seed(0)
    vqgan = VQGAN(config)
    vqgan.quantize.embedding.copy_(torch.randn(config.codes, config.code_width))
    return vqgan


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_follow_the_factor_for_any_multiple_of_it(config: VQGANConfig) -> None:
    vqgan = build(config)
    tokenizer: ImageTokenizer = vqgan
    images = torch.rand(2, 3, 4 * tokenizer.factor, 3 * tokenizer.factor) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, 4, 3)
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.codes
    assert tokenizer.decode(tokens).shape == images.shape
    assert torch.equal(tokens, tokenizer.encode(images))


def test_reconstruction_is_decode_of_encode_and_gradients_pass_straight_through() -> None:
    vqgan = build(CONFIGS[0])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = vqgan(images)
    torch.testing.assert_close(output.images, vqgan.decode(vqgan.encode(images)))
    z = vqgan.encoder(images)
    expected = (z - vqgan.quantize.lookup(vqgan.encode(images)).permute(0, 3, 1, 2)).square()
    torch.testing.assert_close(output.commitment, expected.flatten(1).mean(1))
    output.images.sum().backward()
    assert all(parameter.grad is not None for parameter in vqgan.encoder.parameters())


def test_without_the_codebook_it_is_a_plain_autoencoder() -> None:
    vqgan = build(CONFIGS[0])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(vqgan(images, quantised=False).images, vqgan.decoder(vqgan.encoder(images)))


def test_bytes_and_signal_are_inverse() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_bytes(to_signal(every)), every)
    assert to_signal(every).min() == -1
    assert to_signal(every).max() == 1


def test_group_norm_needs_channels_it_can_group() -> None:
    with pytest.raises(ValidationError, match="multiple of 32"):
        VQGANConfig(channels=48)
