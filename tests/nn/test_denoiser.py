import math
import re

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.nn.config import (
    ClassCondition,
    Convolutional,
    DenoiserConfig,
    FeedForwardConfig,
    FullyConnected,
    NoCondition,
    TextCondition,
    TimestepEmbedding,
)
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.layers import (
    GELU2,
    AdaptiveLayerNorm,
    ClassEmbedding,
    ConvolutionalFeedForward,
    ImageEmbedding,
    Rotation,
    build_timestep_embedding,
    init_from_codebook,
)

SMALL = DenoiserConfig(width=24, layers=2, heads=2, condition=TextCondition(width=10))


def build(config: DenoiserConfig = SMALL, *, grid: tuple[int, int] = (3, 4)) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(config.model_copy(update={"init_std": 0.3}), codes=7, grid=grid, steps=9)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 8, (3, 12), generator=generator)
    return tokens, torch.tensor([0, 4, 8]), torch.randn(3, 5, 10, generator=generator)


def test_gelu2_is_the_sigmoid_form() -> None:
    assert GELU2()(torch.tensor(1.0)).item() == pytest.approx(0.845796, abs=1e-6)
    x = torch.linspace(-30, 30, 121, dtype=torch.float64, requires_grad=True)
    plain = x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(GELU2()(x), plain)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (GELU2()(x), plain)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_each_sample_has_its_own_timestep() -> None:
    denoiser = build()
    tokens, t, text = inputs()
    together = denoiser(tokens, t, text)
    for row in range(3):
        alone = denoiser(tokens[row : row + 1], t[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together, denoiser(tokens, t.flip(0), text))


@pytest.mark.parametrize("timestep", ["learned", "sinusoidal"])
def test_adaptive_norm_takes_scale_first_and_adds_one(timestep: TimestepEmbedding) -> None:
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
    "class without a null": SMALL.model_copy(
        update={"condition": ClassCondition(classes=6, null_condition="mean")}
    ),
    "unconditional": SMALL.model_copy(update={"condition": NoCondition()}),
    "convolutional": SMALL.model_copy(update={"feed_forward": Convolutional()}),
    "sinusoidal": SMALL.model_copy(update={"timestep": "sinusoidal"}),
    "published positions": SMALL.model_copy(update={"position_grid": (8, 8)}),
    "normalised queries and keys": SMALL.model_copy(update={"qk_norm": True}),
    "rotary": SMALL.model_copy(update={"rope_2d": True}),
}


def condition_of(config: DenoiserConfig) -> torch.Tensor | None:
    if isinstance(config.condition, TextCondition):
        return inputs()[2]
    return torch.tensor([0, 5, 6]) if isinstance(config.condition, ClassCondition) else None


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_prepared_forward_equals_plain_forward(config: DenoiserConfig) -> None:
    denoiser = build(config)
    condition = condition_of(config)
    prepare = denoiser.prepare(condition)
    tokens, _, _ = inputs()
    for t in (0, 3, 8):
        plain = denoiser(tokens, torch.full((3,), t), condition)
        torch.testing.assert_close(prepare(tokens, t), plain, atol=1e-5, rtol=0)
    assert not torch.allclose(prepare(tokens, 0), prepare(tokens, 8))


def test_prepared_tables_are_computed_once() -> None:
    denoiser = build()
    tokens, _, text = inputs()
    prepare = denoiser.prepare(text)
    computed: list[str] = []
    names = {module: name for name, module in denoiser.named_modules()}

    def record(module: nn.Module, inputs: object, output: object) -> None:
        computed.append(names[module])

    for module in names:
        module.register_forward_hook(record)
    prepare(tokens, 3)
    again = re.compile(r"ln1|ln1_1|attn2\.(key|value)|_emb")
    assert "blocks.1.attn2.query" in computed
    assert [name for name in computed if again.search(name.removeprefix("content_emb.emb"))] == []


@pytest.mark.parametrize("name", ["text", "class", "unconditional"])
def test_condition_of_the_wrong_kind_is_refused(name: str) -> None:
    config = VARIANTS[name]
    denoiser = build(config)
    tokens, t, text = inputs()
    wrong = text if name == "unconditional" else None
    with pytest.raises(ValueError, match=f"condition '{config.condition.kind}' was given"):
        denoiser(tokens, t, wrong)
    with pytest.raises(ValueError, match=f"condition '{config.condition.kind}' was given"):
        denoiser.prepare(wrong)


def test_missing_null_class_is_the_mean_of_class_embeddings() -> None:
    """The reference code reads the first sample's label only and applies it to the batch."""
    embedding = ClassEmbedding(classes=6, width=4, null="mean")
    assert embedding.weight.shape == (6, 4)
    class_embeddings = embedding(torch.tensor([2, 6, 0]))
    expected = torch.stack([embedding.weight[2], embedding.weight.mean(dim=0), embedding.weight[0]])
    torch.testing.assert_close(class_embeddings, expected)
    learned = ClassEmbedding(classes=6, width=4, null="learned")
    assert learned.weight.shape == (7, 4)
    torch.testing.assert_close(learned(torch.tensor([6])), learned.weight[6:])


def test_class_enters_before_feed_forward_and_time_before_attention() -> None:
    denoiser = build(VARIANTS["class"])
    assert {name.split(".")[2] for name, _ in denoiser.blocks.named_parameters(prefix="blocks")} == {
        "ln1",
        "attn1",
        "ln2",
        "mlp",
    }
    tokens, t, _ = inputs()
    classes = torch.tensor([1, 2, 6])
    base = denoiser(tokens, t, classes)
    for changed_logits in (denoiser(tokens, t, classes.flip(0)), denoiser(tokens, t.flip(0), classes)):
        assert (changed_logits - base)[[0, 2]].abs().amax(dim=(1, 2)).gt(1e-3).all()
        torch.testing.assert_close(changed_logits[1], base[1])


def test_published_16x16_tokens_use_a_position_grid_of_32() -> None:
    published = ImageEmbedding(codes=7, grid=(16, 16), width=4, position_grid=(32, 32))
    plain = ImageEmbedding(codes=7, grid=(16, 16), width=4)
    for embedding, row, column in ((published, 0, 20), (plain, 1, 4)):
        place = embedding.height_emb.weight[row] + embedding.width_emb.weight[column]
        torch.testing.assert_close(embedding.positions()[20], place)
        tokens = torch.full((1, 256), 3)
        torch.testing.assert_close(embedding(tokens)[0, 20], embedding.emb.weight[3] + place)
    torch.testing.assert_close(
        published.positions()[255], published.height_emb.weight[7] + published.width_emb.weight[31]
    )


def test_too_small_position_tables_are_refused() -> None:
    with pytest.raises(UserError, match="position_grid: 2x3 positions are too few for a grid of 3x4"):
        build(SMALL.model_copy(update={"position_grid": (2, 3)}))


def test_sinusoids_equal_published_values_in_any_precision() -> None:
    norm = AdaptiveLayerNorm(build_timestep_embedding("sinusoidal", width=8, steps=100), width=8)
    angles = [37 / 100 * 4000 * math.exp(-math.log(10_000) / 3 * i) for i in range(4)]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
    t = torch.tensor([37])
    torch.testing.assert_close(norm.emb(t)[0], expected, atol=1e-3, rtol=0)
    assert not list(norm.emb.parameters())
    torch.testing.assert_close(
        norm.bfloat16().modulation(t).scale.float(), norm.float().modulation(t).scale, atol=2e-2, rtol=2e-2
    )


OPTIONS = ("qk_norm", "rope_2d", "adaln_zero", "gradient_checkpointing")


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_off_by_default(option: str) -> None:
    tokens, t, text = inputs()
    assert not getattr(DenoiserConfig(), option)
    plain, changed = build(), build(SMALL.model_copy(update={option: True}))
    expected = set(plain.state_dict())
    if option == "qk_norm":
        expected |= {
            f"blocks.{block}.{attention}.{part}_norm.weight"
            for block in (0, 1)
            for attention in ("attn1", "attn2")
            for part in ("query", "key")
        }
    assert set(changed.state_dict()) == expected
    same = torch.allclose(changed(tokens, t, text), plain(tokens, t, text), atol=1e-6)
    assert same == (option == "gradient_checkpointing")


def test_normalized_queries_and_keys_ignore_weight_scale() -> None:
    denoiser = build(VARIANTS["normalised queries and keys"])
    tokens, t, text = inputs()
    base = denoiser(tokens, t, text)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if re.search(r"attn\d\.(query|key)\.", name):
                parameter.mul_(100)
    torch.testing.assert_close(denoiser(tokens, t, text), base, atol=1e-3, rtol=1e-3)


def test_rotary_attention_depends_on_row_and_column_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 12, generator=generator).expand(2, 1, 30, 2, 12)
    rotation = Rotation.of((5, 6), 12, query)
    turned = torch.einsum("blhd,bmhd->hlm", rotation(query), rotation(key))[0].unflatten(0, (5, 6))
    scores = turned.unflatten(-1, (5, 6))
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[2, 1, 4, 4])
    torch.testing.assert_close(scores[4, 5, 3, 1], scores[1, 4, 0, 0])
    assert (scores[0, 0, 2, 3] - scores[0, 0, 3, 2]).abs() > 1e-2
    assert (scores[0, 0, 0, 0] - scores[0, 0, 1, 0]).abs() > 1e-2
    torch.testing.assert_close(rotation(query).norm(dim=-1), query.norm(dim=-1))


def test_rotary_positions_need_head_dims_divisible_by_four() -> None:
    with pytest.raises(ValidationError, match="must be a multiple of 4, not 6"):
        DenoiserConfig(width=12, heads=2, rope_2d=True)


def test_adaln_zero_starts_as_a_plain_layer_norm() -> None:
    denoiser = build(SMALL.model_copy(update={"adaln_zero": True}))
    tokens, t, text = inputs()
    torch.testing.assert_close(denoiser(tokens, t, text), denoiser(tokens, t.flip(0), text))
    norm = next(module for module in denoiser.modules() if isinstance(module, AdaptiveLayerNorm))
    x = torch.randn(3, 12, 24)
    torch.testing.assert_close(norm(x, t), functional.layer_norm(x, (24,)))
    denoiser(tokens, t, text).square().mean().backward()
    assert norm.linear.weight.grad is not None
    assert norm.linear.weight.grad.any()


def test_gradient_checkpointing_saves_memory_at_equal_results() -> None:
    tokens, t, text = inputs()
    text.requires_grad_()
    results: list[tuple[torch.Tensor, ...]] = []
    saved_elements: list[int] = []
    for gradient_checkpointing in (False, True):
        denoiser = build(SMALL.model_copy(update={"gradient_checkpointing": gradient_checkpointing}))
        sizes: list[int] = []

        def packed(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
            logits = denoiser(tokens, t, text)
        saved_elements.append(sum(sizes))
        gradients = torch.autograd.grad(logits.square().mean(), [text, *denoiser.parameters()])
        results.append((logits, *gradients))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
    assert saved_elements[1] < saved_elements[0] / 4


@pytest.mark.parametrize("feed_forward", [FullyConnected(), Convolutional()], ids=["fc", "conv"])
@pytest.mark.parametrize("grid", [(3, 7), (7, 3), (1, 5)])
def test_any_grid(grid: tuple[int, int], feed_forward: FeedForwardConfig) -> None:
    denoiser = build(SMALL.model_copy(update={"feed_forward": feed_forward}), grid=grid)
    _, t, text = inputs()
    tokens = torch.randint(0, 8, (3, grid[0] * grid[1]), generator=torch.Generator().manual_seed(1))
    logits = denoiser(tokens, t, text)
    assert logits.shape == (3, grid[0] * grid[1], 7)
    torch.testing.assert_close(denoiser.prepare(text)(tokens, 4)[1], logits[1], atol=1e-5, rtol=0)


def test_logits_depend_on_caption_and_all_positions() -> None:
    denoiser = build()
    tokens, t, text = inputs()
    base = denoiser(tokens, t, text)
    other_captions = text + torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(2))
    assert (denoiser(tokens, t, other_captions) - base).abs().amax(dim=2).gt(0).all()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 8
    assert (denoiser(changed, t, text) - base).abs().amax(dim=2).gt(0).all()


def test_head_consumer_equals_logits() -> None:
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


def test_convolutions_keep_torch_initial_weights() -> None:
    torch.manual_seed(0)
    config = DenoiserConfig(width=48, layers=1, heads=4, feed_forward=Convolutional(mlp_ratio=2))
    layer = Denoiser(config, 50, (8, 8), steps=100).get_submodule("blocks.0.mlp")
    for name, shape in {"0": (96, 48, 3, 3), "2": (48, 96, 3, 3)}.items():
        weight = layer.get_parameter(f"{name}.weight")
        bound = (shape[1] * 9) ** -0.5
        assert weight.shape == shape
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert layer.get_parameter(f"{name}.bias").any()


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValidationError, match="not a multiple of heads"):
        DenoiserConfig(width=10, heads=4)


def test_similar_codes_start_with_similar_embeddings() -> None:
    denoiser = build(SMALL)
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    init_from_codebook(denoiser.code_embeddings, vectors, std=0.5)
    whitened = (vectors - vectors.mean(0)) / vectors.std(0)
    for weight in (denoiser.content_emb.emb.weight[:-1], denoiser.head.weight):
        # A rotation keeps all angles and lengths: the products of the rows are those of the code vectors.
        torch.testing.assert_close(weight @ weight.T, 0.25 * whitened @ whitened.T, atol=1e-5, rtol=1e-4)
