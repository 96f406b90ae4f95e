import pytest
import torch
from pydantic import ValidationError

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import ImageTokenizer, SamplingKey
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

CONFIGS = [
    VQGANConfig(
        codebook_size=5, code_dim=3, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm="none"
    ),
    VQGANConfig(
        codebook_size=5,
        code_dim=3,
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        patch_size=4,
        norm="none",
    ),
    VQGANConfig(codebook_size=5, code_dim=3, channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=2),
]


def build(config: VQGANConfig) -> VQGAN:
    torch.manual_seed(0)
    vqgan = VQGAN(config)
    vqgan.quantize.embedding.copy_(torch.randn(config.codebook_size, config.code_dim))
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


def test_reconstruction_decodes_encoding_with_straight_through_gradient() -> None:
    vqgan = build(CONFIGS[0])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = vqgan(images)
    torch.testing.assert_close(output.images, vqgan.decode(vqgan.encode(images)))
    z = vqgan.encoder(images)
    expected = (z - vqgan.quantize.lookup(vqgan.encode(images)).permute(0, 3, 1, 2)).square()
    torch.testing.assert_close(output.commitment, expected.flatten(1).mean(1))
    output.images.sum().backward()
    assert all(parameter.grad is not None for parameter in vqgan.encoder.parameters())


def test_without_codebook_is_a_plain_autoencoder() -> None:
    vqgan = build(CONFIGS[0])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(vqgan(images, quantized=False).images, vqgan.decoder(vqgan.encoder(images)))


def test_group_norm_requires_divisible_channels() -> None:
    with pytest.raises(ValidationError, match="multiple of 32"):
        VQGANConfig(channels=48)


def test_attention_levels_must_exist() -> None:
    with pytest.raises(ValidationError, match="levels below 4"):
        VQGANConfig(attention=(4,))


def test_codebook_has_1x1_convolutions_on_both_sides() -> None:
    config = CONFIGS[0].model_copy(update={"latent_channels": 7})
    vqgan = build(config)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    z = vqgan.quant_conv(vqgan.encoder(images))
    assert vqgan.encoder(images).shape[1] == 7
    assert z.shape[1] == 3
    tokens = vqgan.quantize.nearest(z.permute(0, 2, 3, 1).flatten(0, 2)).view(2, 4, 4)
    assert torch.equal(vqgan.encode(images), tokens)
    quantized = vqgan.quantize.lookup(tokens).permute(0, 3, 1, 2)
    expected = vqgan.decoder(vqgan.post_quant_conv(quantized))
    torch.testing.assert_close(vqgan.decode(tokens), expected)
    torch.testing.assert_close(vqgan(images).images, expected)


def test_sampling_without_probabilities_is_refused() -> None:
    with pytest.raises(UserError, match="VQGAN gives no probabilities"):
        build(CONFIGS[0]).encode(torch.zeros(1, 3, 8, 8), SamplingKey(seed=0, slots=torch.zeros(1).long()))


def test_code_vectors_are_the_codebook() -> None:
    vqgan = build(CONFIGS[0])
    assert torch.equal(vqgan.code_vectors(), vqgan.quantize.embedding)
