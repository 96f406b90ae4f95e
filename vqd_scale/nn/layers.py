"""The parts that the networks share (VQ-Diffusion, arXiv 2111.14822; layout of its published weights)."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.config import Config
from vqd_scale.nn.attention import AttentionBackend, attention

TimestepEmbedding = Literal["learned", "sinusoidal"]

_SINUSOID_SCALE = 4000
_SINUSOID_PERIOD = 10000


class FullyConnected(Config):
    """Two linear layers, ``multiplier`` times as wide between them."""

    kind: Literal["fc"] = "fc"
    multiplier: PositiveInt = 4


class Convolutional(Config):
    """Two 3x3 convolutions over the token grid, ``multiplier`` times as wide between them."""

    kind: Literal["conv"] = "conv"
    multiplier: PositiveInt = 2


FeedForwardConfig = Annotated[FullyConnected | Convolutional, Field(discriminator="kind")]


class GELU2(nn.Module):
    """x * sigmoid(1.702 x), the activation of all published weights; CLIP calls it QuickGELU."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply it elementwise."""
        return x * torch.sigmoid(1.702 * x)


class ImageEmbedding(nn.Module):
    """Code + row + column embedding; the table has a last row for the mask.

    Args:
        codes: K, the number of codes without the mask.
        grid: Height and width in tokens.
        width: Embedding width.
    """

    def __init__(self, codes: int, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.emb = nn.Embedding(codes + 1, width)
        self.height_emb = nn.Embedding(grid[0], width)
        self.width_emb = nn.Embedding(grid[1], width)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Embed tokens in raster order."""
        rows = self.height_emb(torch.arange(self.grid[0], device=tokens.device))
        columns = self.width_emb(torch.arange(self.grid[1], device=tokens.device))
        return self.emb(tokens) + (rows[:, None] + columns[None]).flatten(0, 1)


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm without weights, then scale and shift from the timestep: LN(x)(1 + scale_t) + shift_t.

    Args:
        width: Feature width.
        steps: T, the number of timesteps.
        timestep: A learned table (all published weights) or sinusoids.
    """

    def __init__(self, width: int, steps: int, timestep: TimestepEmbedding) -> None:
        super().__init__()
        self.emb = nn.Embedding(steps, width) if timestep == "learned" else SinusoidalEmbedding(width, steps)
        self.linear = nn.Linear(width, 2 * width)
        self.width = width

    def forward(
        self, x: Float[Tensor, "batch length width"], t: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch length width"]:
        """Normalise each position; ``t`` holds each sample's own timestep."""
        scale, shift = self.linear(functional.silu(self.emb(t)))[:, None].chunk(2, dim=-1)
        return functional.layer_norm(x, (self.width,)) * (1 + scale) + shift


class SinusoidalEmbedding(nn.Module):
    """Sine and cosine of t / T * 4000 at geometric frequencies."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.width = width
        self.steps = steps

    def forward(self, t: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Embed timesteps, in float32."""
        half = self.width // 2
        frequencies = torch.arange(half, device=t.device) * (-math.log(_SINUSOID_PERIOD) / (half - 1))
        angles = (t / self.steps * _SINUSOID_SCALE)[:, None] * frequencies.exp()[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention; queries from ``width``, keys and values from ``context_width``.

    Args:
        width: Feature width of queries and output.
        heads: Number of heads; must divide ``width``.
        context_width: Feature width of keys and values.
        backend: See `vqd_scale.nn.attention`.
    """

    def __init__(self, width: int, heads: int, context_width: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.proj = nn.Linear(width, width)
        self.heads = heads
        self.backend: AttentionBackend = backend

    def forward(
        self, x: Float[Tensor, "batch length width"], context: Float[Tensor, "batch keys context_width"]
    ) -> Float[Tensor, "batch length width"]:
        """Attend from each position of ``x`` to all of ``context`` (pass ``x`` twice for self-attention)."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1))
            for projected in (self.query(x), self.key(context), self.value(context))
        )
        return self.proj(attention(query, key, value, self.backend).flatten(-2))


class FeedForward(nn.Sequential):
    """Linear, GELU2, Linear at each position."""

    def __init__(self, width: int, multiplier: int) -> None:
        super().__init__(nn.Linear(width, multiplier * width), GELU2(), nn.Linear(multiplier * width, width))


class ConvolutionalFeedForward(nn.Sequential):
    """Conv3x3, GELU2, Conv3x3 over the token grid."""

    def __init__(self, width: int, multiplier: int, grid: tuple[int, int]) -> None:
        super().__init__(
            nn.Conv2d(width, multiplier * width, 3, padding=1),
            GELU2(),
            nn.Conv2d(multiplier * width, width, 3, padding=1),
        )
        self.grid = grid

    def forward(self, input: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """Fold the raster order into the grid, convolve, and unfold it."""
        image = input.transpose(1, 2).unflatten(-1, self.grid)
        return super().forward(image).flatten(2).transpose(1, 2)


def build_feed_forward(config: FeedForwardConfig, width: int, grid: tuple[int, int]) -> nn.Module:
    """The feed-forward part that the configuration names."""
    if isinstance(config, Convolutional):
        return ConvolutionalFeedForward(width, config.multiplier, grid)
    return FeedForward(width, config.multiplier)
