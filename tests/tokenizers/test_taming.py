import copy
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import SamplingKey
from vqd_scale.tokenizers.codebook import quantizer as module
from vqd_scale.tokenizers.config import (
    FFHQ_F16,
    IMAGENET_F16,
    OPENIMAGES_GUMBEL_F8,
    TamingGumbelConfig,
    TamingVQConfig,
)
from vqd_scale.tokenizers.taming import GumbelCodebook, TamingGumbel, TamingVQ, taming_config

GUMBEL_F8 = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.GumbelVQ
  params:
    kl_weight: 1.0e-08
    embed_dim: 256
    n_embed: 8192
    monitor: val/rec_loss
    temperature_scheduler_config: {target: taming.lr_scheduler.LambdaWarmUpCosineScheduler}
    ddconfig:
      double_z: false
      z_channels: 256
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 1, 2, 4]
      num_res_blocks: 2
      attn_resolutions: [32]
      dropout: 0.0
    lossconfig: {target: taming.modules.losses.vqperceptual.DummyLoss}
"""
IMAGENET_F16_YAML = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 16384
    ddconfig: {double_z: false, z_channels: 256, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
               ch_mult: [1, 1, 2, 2, 4], num_res_blocks: 2, attn_resolutions: [16], dropout: 0.0}
"""
FFHQ_TRANSFORMER = """
model:
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    transformer_config: {target: taming.modules.transformer.mingpt.GPT, params: {vocab_size: 1024}}
    first_stage_config:
      target: taming.models.vqgan.VQModel
      params:
        embed_dim: 256
        n_embed: 1024
        ddconfig: {double_z: false, z_channels: 256, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
                   ch_mult: [1, 1, 2, 2, 4], num_res_blocks: 2, attn_resolutions: [16], dropout: 0.0}
"""
LATENT_DIFFUSION_F4 = """
model:
  target: ldm.models.autoencoder.VQModelInterface
  params:
    embed_dim: 3
    n_embed: 8192
    ddconfig: {double_z: false, z_channels: 3, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
               ch_mult: [1, 2, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GUMBEL_F8, OPENIMAGES_GUMBEL_F8),
        (IMAGENET_F16_YAML, IMAGENET_F16),
        (FFHQ_TRANSFORMER, FFHQ_F16),
        (
            LATENT_DIFFUSION_F4,
            TamingVQConfig(
                codebook_size=8192, code_dim=3, latent_channels=3, channel_multipliers=(1, 2, 4), attention=()
            ),
        ),
    ],
    ids=["gumbel f8", "imagenet f16", "ffhq in a transformer", "f4"],
)
def test_published_yaml_files_become_configurations(text: str, expected: TamingVQConfig) -> None:
    assert taming_config(yaml.safe_load(text), "model.yaml") == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["model", "target"], "taming.models.vqgan.VQSegmentationModel", "one of VQModel, .* not 'VQSegm"),
        (["model", "params", "ddconfig", "double_z"], True, "ddconfig.double_z: given True, allowed: False"),
        (["model", "params", "ddconfig", "in_channels"], 182, "ddconfig.in_channels: given 182, allowed: 3"),
        (
            ["model", "params", "ddconfig", "resamp_with_conv"],
            False,
            "conv: given False, allowed: True",
        ),
        (["model", "params", "ddconfig", "ch_mult"], [2, 4], "must start with 1"),
        (["model", "params", "ddconfig", "ch"], 100, "must be a multiple of 32"),
        (["model", "params", "ddconfig"], "none", "ddconfig: given 'none', allowed: a mapping"),
        (["model", "params", "n_embed"], None, "n_embed: given None, allowed: a valid integer"),
    ],
)
def test_foreign_yaml_files_raise_user_error(path: list[str], value: object, message: str) -> None:
    values: Any = copy.deepcopy(yaml.safe_load(GUMBEL_F8))
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(UserError, match=message):
        taming_config(values, "model.yaml")


def test_missing_yaml_keys_are_listed() -> None:
    values: Any = yaml.safe_load(GUMBEL_F8)
    del values["model"]["params"]["embed_dim"], values["model"]["params"]["ddconfig"]["z_channels"]
    with pytest.raises(UserError, match="embed_dim: required, but not given"):
        taming_config(values, "model.yaml")
    with pytest.raises(UserError, match="model: required, but not given"):
        taming_config({}, "model.yaml")


def tokenizer() -> TamingGumbel:
    torch.manual_seed(0)
    config = TamingGumbelConfig(
        codebook_size=12,
        code_dim=4,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=4,
        attention=(),
    )
    return TamingGumbel(config).requires_grad_(False)


def random_images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encoding_ignores_torch_random_state() -> None:
    gumbel, images = tokenizer(), random_images()
    torch.manual_seed(1)
    first = gumbel.encode(images)
    torch.manual_seed(2)
    assert torch.equal(gumbel.encode(images), first)
    assert torch.equal(gumbel.train().encode(images), first)
    logits = gumbel.quantize.proj(gumbel.latents(images))
    assert torch.equal(first, logits.argmax(1))


def test_sampled_codes_are_a_function_of_seed_and_slot() -> None:
    gumbel, images = tokenizer(), random_images()
    slots = torch.tensor([7, 1, 2**40])
    torch.manual_seed(1)
    sampled = gumbel.encode(images, SamplingKey(seed=5, slots=slots))
    torch.manual_seed(2)
    assert torch.equal(gumbel.encode(images, SamplingKey(5, slots)), sampled)
    assert torch.equal(gumbel.encode(images[[2, 0]], SamplingKey(5, slots[[2, 0]])), sampled[[2, 0]])
    assert not torch.equal(gumbel.encode(images), sampled)
    assert not torch.equal(gumbel.encode(images, SamplingKey(6, slots)), sampled)
    assert not torch.equal(gumbel.encode(images, SamplingKey(5, slots + 1)), sampled)
    with pytest.raises(ValueError, match="one slot for each of 3 images, got 1"):
        gumbel.encode(images, SamplingKey(5, slots[:1]))


def test_sampled_codes_have_classifier_probabilities() -> None:
    torch.manual_seed(0)
    codebook = GumbelCodebook(codes=6, width=4).requires_grad_(False)
    vector, count = torch.randn(1, 4) * 2, 20_000
    expected = count * codebook.proj(vector[..., None, None])[0, :, 0, 0].softmax(0).double()
    uniform_numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids = codebook.sample(vector.expand(count, 4), uniform_numbers)
    counts = torch.bincount(ids, minlength=6)
    assert (counts - expected).abs().max() < 1.5
    assert counts.min() > 100


def test_large_classifier_runs_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codebook = GumbelCodebook(codes=6, width=4).requires_grad_(False)
    vectors, uniform_numbers = torch.randn(50, 4), torch.rand(50, dtype=torch.float64)
    expected_codes = codebook.nearest(vectors), codebook.sample(vectors, uniform_numbers)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * codebook.codes)
    assert torch.equal(codebook.nearest(vectors), expected_codes[0])
    assert torch.equal(codebook.sample(vectors, uniform_numbers), expected_codes[1])


TINY: dict[str, Any] = {
    "codebook_size": 6,
    "code_dim": 4,
    "channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
    "latent_channels": 4,
    "attention": (),
}


def test_codebook_and_commitment_terms_have_separate_gradients() -> None:
    torch.manual_seed(0)
    tokenizer = TamingVQ(TamingVQConfig(**TINY))
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    output = tokenizer(images)
    torch.testing.assert_close(output.images, tokenizer.decode(tokenizer.encode(images)))
    assert output.codebook is not None
    assert torch.equal(output.codebook, output.commitment)
    codes = tokenizer.quantize.get_parameter("embedding.weight")
    encoder = tokenizer.quant_conv.get_parameter("weight")
    for term, moved in ((output.codebook, codes), (output.commitment, encoder), (output.images, encoder)):
        gradients = torch.autograd.grad(term.sum(), [codes, encoder], retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [moved is codes, moved is encoder]


def test_gumbel_codes_follow_probabilities_and_pass_gradients() -> None:
    torch.manual_seed(0)
    tokenizer = TamingGumbel(TamingGumbelConfig(**TINY))
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    one = torch.ones(())
    output = tokenizer(images, SamplingKey(5, torch.arange(3)), one)
    assert output.divergence is not None
    decoded = tokenizer.decode(output.ids.view(3, 4, 4))
    torch.testing.assert_close(output.images, decoded, rtol=1e-4, atol=1e-5)
    alone = tokenizer(images[1:2], SamplingKey(5, torch.tensor([1])), one)
    assert torch.equal(alone.ids, output.ids.view(3, -1)[1])
    output.images.square().sum().backward()
    assert tokenizer.quantize.proj.weight.grad is not None
    assert tokenizer.quantize.embed.weight.grad is not None
    probabilities = tokenizer.quantize.proj(tokenizer.latents(images[:1]))[0, :, 0, 0].softmax(0).detach()
    with torch.no_grad():
        repeated_output = tokenizer(
            images[:1].expand(400, -1, -1, -1), SamplingKey(7, torch.arange(400)), one
        )
    shares = torch.bincount(repeated_output.ids.view(400, -1)[:, 0], minlength=6) / 400
    assert float((shares - probabilities).abs().max()) < 0.08


def test_divergence_is_from_uniform_in_nats() -> None:
    codebook = GumbelCodebook(6, 4)
    vectors, half = torch.randn(5, 4), torch.full((5, 6), 0.5)
    probabilities = codebook.proj(vectors[..., None, None])[..., 0, 0].softmax(1)
    expected = (probabilities * (probabilities * 6).log()).sum(1)
    torch.testing.assert_close(codebook.gumbel_softmax(vectors, half, torch.ones(()))[2], expected)
    for parameter in codebook.proj.parameters():
        nn.init.zeros_(parameter)
    assert float(codebook.gumbel_softmax(vectors, half, torch.ones(()))[2].abs().max()) < 1e-6
