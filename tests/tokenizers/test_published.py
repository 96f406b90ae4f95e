"""Published tokenizers against a plain implementation of them, written from their description alone.

The plain one knows names of weights and arithmetic, no modules: what it and the package agree on is the
architecture.
"""

import math
import re
from collections.abc import Iterator

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.convolutions import ConvolutionsConfig
from vqd_scale.tokenizers.taming import (
    FFHQ_F16,
    IMAGENET_F16,
    OPENIMAGES_GUMBEL_F8,
    TamingGumbel,
    TamingGumbelConfig,
    TamingVQ,
    TamingVQConfig,
)
from vqd_scale.tokenizers.vqgan import ITHQ, VQGAN, VQGANConfig
from vqd_scale.tokenizers.weights import from_diffusers, from_taming, to_diffusers

Published = VQGANConfig | TamingVQConfig | TamingGumbelConfig
State = dict[str, Tensor]

SLIM = {"codes": 11, "channels": 32, "latent_width": 6, "code_width": 4}
VARIANTS: dict[str, Published] = {
    "gumbel f8": OPENIMAGES_GUMBEL_F8.model_copy(update=SLIM),
    "vq f16": IMAGENET_F16.model_copy(update=SLIM),
    "vq f8, widening at once": TamingVQConfig(
        **SLIM, multipliers=(1, 2, 2, 4), attention=(1, 3), residual_blocks=1
    ),
    "vq f4, no attention but in the middle": TamingVQConfig(**SLIM, multipliers=(1, 2, 4), attention=()),
    "ithq": ITHQ.model_copy(update=SLIM),
}


def build(config: Published, seed: int = 0) -> VQGAN | TamingVQ | TamingGumbel:
    """Random weights of trained ones' size, norms' too: pixels about fill [-1, 1], and codes are latents."""
    torch.manual_seed(seed)
    match config:
        case VQGANConfig():
            tokenizer = VQGAN(config)
        case TamingVQConfig():
            tokenizer = TamingVQ(config)
        case TamingGumbelConfig():
            tokenizer = TamingGumbel(config)
    state = tokenizer.state_dict()
    for name, value in state.items():
        if "norm" in name:
            state[name] = value + 0.2 * torch.randn_like(value)
        elif name.endswith("weight") and value.ndim == 4:
            state[name] = torch.randn_like(value) / value[0].numel() ** 0.5
    state["decoder.conv_out.weight"] *= 0.4
    tokenizer.load_state_dict(state)
    tokenizer.requires_grad_(False)
    for name, value in tokenizer.state_dict().items():
        if "quantize" in name and value.shape == (config.codes, config.code_width):
            value.copy_(latents_of(tokenizer, config.codes))
    return tokenizer


def latents_of(tokenizer: VQGAN | TamingVQ | TamingGumbel, count: int) -> Tensor:
    images = torch.rand(count, 3, tokenizer.factor, tokenizer.factor) * 2 - 1
    return tokenizer.latents(images).flatten(1)


# The plain implementation.


def conv(state: State, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    deviation = (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    scaled = ((groups - groups.mean(-1, keepdim=True)) / deviation).view_as(x)
    return scaled * state[f"{name}.weight"].view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(state: State, name: str, x: Tensor) -> Tensor:
    h = conv(state, f"{name}.conv1", swish(norm(state, f"{name}.norm1", x)), padding=1)
    h = conv(state, f"{name}.conv2", swish(norm(state, f"{name}.norm2", h)), padding=1)
    if h.shape != x.shape:
        x = conv(state, f"{name}.nin_shortcut", x)
    return x + h


def attention(state: State, name: str, x: Tensor) -> Tensor:
    batch, width, height, breadth = x.shape
    h = norm(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", h).view(batch, width, -1) for part in "qkv")
    weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(width)).softmax(-1)
    seen = torch.einsum("bij,bcj->bci", weights, v).view(batch, width, height, breadth)
    return x + conv(state, f"{name}.proj_out", seen)


def middle(state: State, side: str, x: Tensor) -> Tensor:
    x = residual(state, f"{side}.mid.block_1", x)
    x = attention(state, f"{side}.mid.attn_1", x)
    return residual(state, f"{side}.mid.block_2", x)


def encoded(state: State, config: ConvolutionsConfig, images: Tensor) -> Tensor:
    x = conv(state, "encoder.conv_in", images, padding=1)
    for level in range(len(config.multipliers)):
        for block in range(config.residual_blocks):
            x = residual(state, f"encoder.down.{level}.block.{block}", x)
            if level in config.attention:
                x = attention(state, f"encoder.down.{level}.attn.{block}", x)
        if level < len(config.multipliers) - 1:
            x = conv(
                state, f"encoder.down.{level}.downsample.conv", functional.pad(x, (0, 1, 0, 1)), stride=2
            )
    x = swish(norm(state, "encoder.norm_out", middle(state, "encoder", x)))
    return conv(state, "quant_conv", conv(state, "encoder.conv_out", x, padding=1))


def decoded(state: State, config: ConvolutionsConfig, z: Tensor) -> Tensor:
    x = conv(state, "decoder.conv_in", conv(state, "post_quant_conv", z), padding=1)
    x = middle(state, "decoder", x)
    for level in reversed(range(len(config.multipliers))):
        for block in range(config.residual_blocks + 1):
            x = residual(state, f"decoder.up.{level}.block.{block}", x)
            if level in config.attention:
                x = attention(state, f"decoder.up.{level}.attn.{block}", x)
        if level > 0:
            doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(state, f"decoder.up.{level}.upsample.conv", doubled, padding=1)
    return conv(state, "decoder.conv_out", swish(norm(state, "decoder.norm_out", x)), padding=1)


def codes_of(state: State, z: Tensor) -> Tensor:
    """The most probable code where there is a classifier, the nearest where there is none."""
    if "quantize.proj.weight" in state:
        return conv(state, "quantize.proj", z).argmax(1)
    vectors = state["quantize.embedding" if "quantize.embedding" in state else "quantize.embedding.weight"]
    return (z.permute(0, 2, 3, 1)[..., None, :] - vectors).square().sum(-1).argmin(-1)


def vectors_of(state: State, tokens: Tensor) -> Tensor:
    names = ("quantize.embed.weight", "quantize.embedding.weight", "quantize.embedding")
    return next(state[name] for name in names if name in state)[tokens].permute(0, 3, 1, 2)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_tokens_and_pixels_are_those_of_the_plain_implementation(config: Published) -> None:
    tokenizer = build(config)
    state = tokenizer.state_dict()
    images = torch.rand(2, 3, 2 * config.factor, 3 * config.factor) * 2 - 1
    z = encoded(state, config, images)
    torch.testing.assert_close(tokenizer.latents(images), z, atol=1e-5, rtol=0)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, codes_of(state, z))
    assert tokens.unique().numel() > 1
    pixels = decoded(state, config, vectors_of(state, tokens))
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)


# Names: the published ones, written from their description.


def names(config: Published) -> Iterator[str]:
    def both(stem: str) -> Iterator[str]:
        yield from (f"{stem}.weight", f"{stem}.bias")

    def block(stem: str, width: int, following: int) -> Iterator[str]:
        for part in ("norm1", "conv1", "norm2", "conv2", *(["nin_shortcut"] if width != following else [])):
            yield from both(f"{stem}.{part}")

    def attends(stem: str) -> Iterator[str]:
        for part in ("norm", "q", "k", "v", "proj_out"):
            yield from both(f"{stem}.{part}")

    levels = range(len(config.multipliers))
    for side, folder, more in (("encoder", "down", 0), ("decoder", "up", 1)):
        for stem in ("conv_in", "norm_out", "conv_out"):
            yield from both(f"{side}.{stem}")
        for stem in ("mid.block_1", "mid.block_2"):
            yield from block(f"{side}.{stem}", 1, 1)
        yield from attends(f"{side}.mid.attn_1")
        for level in levels:
            neighbour = max(level - 1, 0) if side == "encoder" else min(level + 1, levels[-1])
            width = config.multipliers[neighbour]
            for number in range(config.residual_blocks + more):
                yield from block(f"{side}.{folder}.{level}.block.{number}", width, config.multipliers[level])
                width = config.multipliers[level]
                if level in config.attention:
                    yield from attends(f"{side}.{folder}.{level}.attn.{number}")
        for level in levels[:-1] if side == "encoder" else levels[1:]:
            yield from both(
                f"{side}.{folder}.{level}.{'downsample' if side == 'encoder' else 'upsample'}.conv"
            )
    yield from both("quant_conv")
    yield from both("post_quant_conv")


@pytest.mark.parametrize(
    ("config", "quantize"),
    [
        (
            OPENIMAGES_GUMBEL_F8,
            {"proj.weight": (8192, 256, 1, 1), "proj.bias": (8192,), "embed.weight": (8192, 256)},
        ),
        (IMAGENET_F16, {"embedding.weight": (16384, 256)}),
        (FFHQ_F16, {"embedding.weight": (1024, 256)}),
        (ITHQ, {"embedding": (4096, 128), "cluster_size": (4096,), "embedding_avg": (4096, 128)}),
    ],
    ids=["gumbel f8", "imagenet f16", "ffhq f16", "ithq"],
)
def test_state_dictionaries_have_the_published_names_and_shapes(
    config: Published, quantize: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        kinds = {"vqgan": VQGAN, "taming_vq": TamingVQ, "taming_gumbel": TamingGumbel}
        state = kinds[config.kind](config).state_dict()
    assert set(state) == {*names(config), *(f"quantize.{name}" for name in quantize)}
    assert {name: tuple(state[f"quantize.{name}"].shape) for name in quantize} == quantize
    coarsest = config.channels * config.multipliers[-1]
    assert state["encoder.mid.attn_1.q.weight"].shape == (coarsest, coarsest, 1, 1)
    assert state["encoder.conv_in.weight"].shape == (config.channels, 3, 3, 3)
    assert state["decoder.conv_out.weight"].shape == (3, config.channels, 3, 3)
    assert state["quant_conv.weight"].shape == (config.code_width, 256, 1, 1)


def test_published_checkpoints_lose_their_losses_and_wrappings() -> None:
    state = build(VARIANTS["vq f16"]).state_dict()
    loss = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    unwrapped = from_taming({**state, **loss})
    inner = {f"first_stage_model.{name}": value for name, value in {**state, **loss}.items()}
    wrapped = from_taming({**inner, "transformer.pos_emb": torch.zeros(1)})
    for found in (unwrapped, wrapped):
        assert found.keys() == state.keys()
        assert all(found[name] is value for name, value in state.items())


# diffusers' VQModel.


def vq_model(config: Published) -> VQModel:
    attends = [level in config.attention for level in range(len(config.multipliers))]
    return VQModel(
        block_out_channels=tuple(config.channels * multiplier for multiplier in config.multipliers),
        layers_per_block=config.residual_blocks,
        latent_channels=config.latent_width or 0,
        vq_embed_dim=config.code_width,
        num_vq_embeddings=config.codes,
        down_block_types=tuple("AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in attends[::-1]),
        norm_num_groups=32,
    )


DIFFUSERS = {name: config for name, config in VARIANTS.items() if name != "gumbel f8"}


@pytest.mark.parametrize("config", DIFFUSERS.values(), ids=DIFFUSERS)
def test_trap_32_forward_parity_with_diffusers_through_the_name_map(config: Published) -> None:
    tokenizer = build(config)
    theirs = vq_model(config)
    theirs.load_state_dict(to_diffusers(tokenizer.state_dict()))
    theirs.requires_grad_(False)
    images = torch.rand(2, 3, 2 * config.factor, 3 * config.factor) * 2 - 1
    latents = theirs.encode(images).latents
    torch.testing.assert_close(tokenizer.latents(images), latents, atol=1e-5, rtol=0)
    tokens = theirs.quantize(latents)[2][2].view(2, 2, 3)
    assert torch.equal(tokenizer.encode(images), tokens)
    quantised = theirs.quantize.get_codebook_entry(tokens.flatten(), (2, 2, 3, config.code_width))
    pixels = theirs.decode(quantised, force_not_quantize=True).sample
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", DIFFUSERS.values(), ids=DIFFUSERS)
def test_trap_32_to_diffusers_and_back_is_bit_equal(config: Published) -> None:
    state = build(config).state_dict()
    back = from_diffusers(to_diffusers(state))
    statistics = ("quantize.cluster_size", "quantize.embedding_avg")
    kept = {name: value for name, value in state.items() if name not in statistics}
    if "quantize.embedding" in kept:
        kept["quantize.embedding.weight"] = kept.pop("quantize.embedding")
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], value) for name, value in kept.items())


def test_trap_32_the_coarsest_level_comes_first_in_diffusers() -> None:
    state = build(VARIANTS["ithq"]).state_dict()
    theirs = to_diffusers(state)
    up = "decoder.up_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(theirs[up], state["decoder.up.3.block.0.conv1.weight"])
    assert theirs["encoder.mid_block.attentions.0.to_q.weight"].ndim == 2


def test_attention_may_have_its_earlier_names() -> None:
    theirs = to_diffusers(build(VARIANTS["ithq"]).state_dict())
    earlier = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed: State = {}
    for name, value in theirs.items():
        new = next((name.replace(new, old) for new, old in earlier.items() if new in name), name)
        renamed[new] = value
    assert renamed.keys() != theirs.keys()
    ours = from_diffusers(theirs)
    assert all(torch.equal(value, ours[name]) for name, value in from_diffusers(renamed).items())


@pytest.mark.parametrize(
    "gone",
    [
        "decoder.up.3.attn.1.q.bias",
        "encoder.mid.block_2.conv1.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "quantize.embedding",
        "quant_conv.bias",
    ],
)
def test_unknown_and_missing_names_are_all_listed(gone: str) -> None:
    state = build(VARIANTS["ithq"]).state_dict()
    del state[gone]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(UserError, match=f"unknown surprise; missing {re.escape(gone)}"):
        to_diffusers(state)


def test_unknown_and_missing_names_of_diffusers_are_all_listed() -> None:
    theirs = to_diffusers(build(VARIANTS["ithq"]).state_dict())
    del theirs["decoder.up_blocks.1.upsamplers.0.conv.bias"]
    with pytest.raises(UserError, match=r"missing decoder.up_blocks.1.upsamplers.0.conv.bias\."):
        from_diffusers(theirs)
    with pytest.raises(
        UserError, match=r"missing .*, encoder\.conv_in\.weight, .*, quantize\.embedding\.weight"
    ):
        from_diffusers({})
