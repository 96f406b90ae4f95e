"""The published tokenizers' architecture and names, implemented independently from their description.

The plain implementation knows names of weights and arithmetic, no modules: what it and the package agree on
is the architecture.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vqd_scale.tokenizers.config import (
    IMAGENET_F16,
    ITHQ,
    OPENIMAGES_GUMBEL_F8,
    ConvolutionsConfig,
    TamingGumbelConfig,
    TamingVQConfig,
    VQGANConfig,
)
from vqd_scale.tokenizers.taming import TamingGumbel, TamingVQ
from vqd_scale.tokenizers.vqgan import VQGAN

Published = VQGANConfig | TamingVQConfig | TamingGumbelConfig
State = dict[str, Tensor]

SLIM: dict[str, Any] = {"codebook_size": 11, "channels": 32, "latent_channels": 6, "code_dim": 4}
VARIANTS: dict[str, Published] = {
    "gumbel f8": OPENIMAGES_GUMBEL_F8.model_copy(update=SLIM),
    "vq f16": IMAGENET_F16.model_copy(update=SLIM),
    "vq f8, widening at once": TamingVQConfig(
        **SLIM, channel_multipliers=(1, 2, 2, 4), attention=(1, 3), num_res_blocks=1
    ),
    "vq f4, no attention but in the middle": TamingVQConfig(
        **SLIM, channel_multipliers=(1, 2, 4), attention=()
    ),
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
        if "quantize" in name and value.shape == (config.codebook_size, config.code_dim):
            value.copy_(latents_of(tokenizer, config.codebook_size))
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
    attended = torch.einsum("bij,bcj->bci", weights, v).view(batch, width, height, breadth)
    return x + conv(state, f"{name}.proj_out", attended)


def middle(state: State, side: str, x: Tensor) -> Tensor:
    x = residual(state, f"{side}.mid.block_1", x)
    x = attention(state, f"{side}.mid.attn_1", x)
    return residual(state, f"{side}.mid.block_2", x)


def encoded(state: State, config: ConvolutionsConfig, images: Tensor) -> Tensor:
    x = conv(state, "encoder.conv_in", images, padding=1)
    for level in range(len(config.channel_multipliers)):
        for block in range(config.num_res_blocks):
            x = residual(state, f"encoder.down.{level}.block.{block}", x)
            if level in config.attention:
                x = attention(state, f"encoder.down.{level}.attn.{block}", x)
        if level < len(config.channel_multipliers) - 1:
            x = conv(
                state, f"encoder.down.{level}.downsample.conv", functional.pad(x, (0, 1, 0, 1)), stride=2
            )
    x = swish(norm(state, "encoder.norm_out", middle(state, "encoder", x)))
    return conv(state, "quant_conv", conv(state, "encoder.conv_out", x, padding=1))


def decoded(state: State, config: ConvolutionsConfig, z: Tensor) -> Tensor:
    x = conv(state, "decoder.conv_in", conv(state, "post_quant_conv", z), padding=1)
    x = middle(state, "decoder", x)
    for level in reversed(range(len(config.channel_multipliers))):
        for block in range(config.num_res_blocks + 1):
            x = residual(state, f"decoder.up.{level}.block.{block}", x)
            if level in config.attention:
                x = attention(state, f"decoder.up.{level}.attn.{block}", x)
        if level > 0:
            doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(state, f"decoder.up.{level}.upsample.conv", doubled, padding=1)
    return conv(state, "decoder.conv_out", swish(norm(state, "decoder.norm_out", x)), padding=1)


def codes_of(state: State, z: Tensor) -> Tensor:
    """Return the most probable code with a classifier, and the nearest code without one."""
    if "quantize.proj.weight" in state:
        return conv(state, "quantize.proj", z).argmax(1)
    vectors = state["quantize.embedding" if "quantize.embedding" in state else "quantize.embedding.weight"]
    return (z.permute(0, 2, 3, 1)[..., None, :] - vectors).square().sum(-1).argmin(-1)


def vectors_of(state: State, tokens: Tensor) -> Tensor:
    names = ("quantize.embed.weight", "quantize.embedding.weight", "quantize.embedding")
    return next(state[name] for name in names if name in state)[tokens].permute(0, 3, 1, 2)


# Names: the published ones, written from their description.


def names(config: Published) -> Iterator[str]:
    def shared_names(stem: str) -> Iterator[str]:
        yield from (f"{stem}.weight", f"{stem}.bias")

    def block(stem: str, width: int, following: int) -> Iterator[str]:
        for part in ("norm1", "conv1", "norm2", "conv2", *(["nin_shortcut"] if width != following else [])):
            yield from shared_names(f"{stem}.{part}")

    def attends(stem: str) -> Iterator[str]:
        for part in ("norm", "q", "k", "v", "proj_out"):
            yield from shared_names(f"{stem}.{part}")

    levels = range(len(config.channel_multipliers))
    for side, folder, extra_blocks in (("encoder", "down", 0), ("decoder", "up", 1)):
        for stem in ("conv_in", "norm_out", "conv_out"):
            yield from shared_names(f"{side}.{stem}")
        for stem in ("mid.block_1", "mid.block_2"):
            yield from block(f"{side}.{stem}", 1, 1)
        yield from attends(f"{side}.mid.attn_1")
        for level in levels:
            neighbor = max(level - 1, 0) if side == "encoder" else min(level + 1, levels[-1])
            width = config.channel_multipliers[neighbor]
            for number in range(config.num_res_blocks + extra_blocks):
                yield from block(
                    f"{side}.{folder}.{level}.block.{number}", width, config.channel_multipliers[level]
                )
                width = config.channel_multipliers[level]
                if level in config.attention:
                    yield from attends(f"{side}.{folder}.{level}.attn.{number}")
        for level in levels[:-1] if side == "encoder" else levels[1:]:
            yield from shared_names(
                f"{side}.{folder}.{level}.{'downsample' if side == 'encoder' else 'upsample'}.conv"
            )
    yield from shared_names("quant_conv")
    yield from shared_names("post_quant_conv")
