import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from vqd_scale.nn.denoiser import ClassCondition, Denoiser, DenoiserConfig, NoCondition, TextCondition
from vqd_scale.nn.layers import (
    GELU2,
    AdaptiveLayerNorm,
    Convolutional,
    ConvolutionalFeedForward,
    TimestepEmbedding,
    build_timestep_embedding,
    start_from_codebook,
)

SMALL = DenoiserConfig(width=24, layers=2, heads=2, condition=TextCondition(width=10))


def build(config: DenoiserConfig = SMALL, *, grid: tuple[int, int] = (3, 4)) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(config.model_copy(update={"initial_deviation": 0.3}), codes=7, grid=grid, steps=9)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 8, (3, 12), generator=generator)
    return tokens, torch.tensor([0, 4, 8]), torch.randn(3, 5, 10, generator=generator)


def test_trap_17_gelu2_is_the_sigmoid_form() -> None:
    assert GELU2()(torch.tensor(1.0)).item() == pytest.approx(0.845796, abs=1e-6)


def test_trap_18_each_sample_has_its_own_timestep() -> None:
    denoiser = build()
    tokens, t, text = inputs()
    together = denoiser(tokens, t, text)
    for row in range(3):
        alone = denoiser(tokens[row : row + 1], t[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together, denoiser(tokens, t.flip(0), text))


@pytest.mark.parametrize("timestep", ["learned", "sinusoidal"])
def test_trap_18_adaptive_norm_takes_scale_first_and_adds_one(timestep: TimestepEmbedding) -> None:
    norm = AdaptiveLayerNorm(build_timestep_embedding(timestep, width=6, steps=9), width=6)
    with torch.no_grad():
        norm.linear.weight.zero_()
        norm.linear.bias.copy_(torch.cat([torch.full((6,), 2.0), torch.full((6,), 5.0)]))
    x = torch.randn(2, 3, 6)
    expected = functional.layer_norm(x, (6,)) * 3.0 + 5.0
    torch.testing.assert_close(norm(x, torch.tensor([0, 8])), expected)


VARIANTS = {
    "text": SMALL,
    "class": SMALL.model_copy(update={"condition": ClassCondition(classes=6)}),
    "class without a null": SMALL.model_copy(update={"condition": ClassCondition(classes=6, null="mean")}),
    "unconditional": SMALL.model_copy(update={"condition": NoCondition()}),
    "convolutional": SMALL.model_copy(update={"feed_forward": Convolutional()}),
    "sinusoidal": SMALL.model_copy(update={"timestep": "sinusoidal"}),
    "published positions": SMALL.model_copy(update={"position_grid": (8, 8)}),
    "normalised queries and keys": SMALL.model_copy(update={"query_key_norm": True}),
    "rotary": SMALL.model_copy(update={"rotary_positions": True}),
}


def condition_of(config: DenoiserConfig) -> torch.Tensor | None:
    if isinstance(config.condition, TextCondition):
        return inputs()[2]
    return torch.tensor([0, 5, 6]) if isinstance(config.condition, ClassCondition) else None


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_is_prepared_equals_the_plain_forward(config: DenoiserConfig) -> None:
    denoiser = build(config)
    condition = condition_of(config)
    prepared = denoiser.prepared(condition)
    tokens, _, _ = inputs()
    for t in (0, 3, 8):
        plain = denoiser(tokens, torch.full((3,), t), condition)
        torch.testing.assert_close(prepared(tokens, t), plain, atol=1e-5, rtol=0)
    assert not torch.allclose(prepared(tokens, 0), prepared(tokens, 8))


def test_the_caption_matters_and_every_position_sees_every_other() -> None:
    denoiser = build()
    tokens, t, text = inputs()
    base = denoiser(tokens, t, text)
    other_captions = text + torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(2))
    assert (denoiser(tokens, t, other_captions) - base).abs().amax(dim=2).gt(0).all()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 8
    assert (denoiser(changed, t, text) - base).abs().amax(dim=2).gt(0).all()


def test_consuming_the_head_equals_its_logits() -> None:
    denoiser = build()
    tokens, t, text = inputs()
    consumed = denoiser.forward(tokens, t, text, functional.linear)
    torch.testing.assert_close(consumed, denoiser(tokens, t, text))


def test_unconditional_model_has_no_cross_attention() -> None:
    denoiser = build(SMALL.model_copy(update={"condition": NoCondition()}))
    tokens, t, _ = inputs()
    assert denoiser(tokens, t, None).shape == (3, 12, 7)
    assert not any("attn2" in name for name, _ in denoiser.named_parameters())


def test_convolutional_feed_forward_works_on_the_grid() -> None:
    layer = ConvolutionalFeedForward(4, 2, (3, 5))
    x = torch.randn(2, 15, 4)
    image = x.reshape(2, 3, 5, 4).permute(0, 3, 1, 2)
    expected = layer[2](layer[1](layer[0](image))).permute(0, 2, 3, 1).reshape(2, 15, 4)
    torch.testing.assert_close(layer(x), expected)


def test_initial_weights_follow_the_recipe() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(width=64, layers=2, heads=4), 50, (8, 8), steps=100)
    for module in denoiser.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.Linear):
            assert not module.bias.any()


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValidationError, match="not a multiple of heads"):
        DenoiserConfig(width=10, heads=4)


def test_codes_that_look_alike_start_alike() -> None:
    denoiser = build(SMALL)
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    start_from_codebook(denoiser.code_tables, vectors, deviation=0.5)
    whitened = (vectors - vectors.mean(0)) / vectors.std(0)
    for weight in (denoiser.content_emb.emb.weight[:-1], denoiser.head.weight):
        # A rotation keeps all angles and lengths: the products of the rows are those of the code vectors.
        torch.testing.assert_close(weight @ weight.T, 0.25 * whitened @ whitened.T, atol=1e-5, rtol=1e-4)
