"""Layers shared by the networks (VQ-Diffusion, arXiv 2111.14822; layout of its published weights)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.nn.attention import attention
from vqd_scale.nn.config import (
    AttentionBackend,
    Convolutional,
    FeedForwardConfig,
    NullClass,
    TimestepEmbedding,
)
from vqd_scale.nn.param_sharding import gather

Hidden: TypeAlias = Float[Tensor, "batch length width"]
Tokens: TypeAlias = Int[Tensor, "batch length"]

_SINUSOID_SCALE = 4000
_SINUSOID_PERIOD = 10000
_ROTATION_BASE = 100.0
"""RoPE base for grids of tens of rows; text's 10,000 would hardly rotate (RoPE-ViT, arXiv 2403.13298)."""
_NORM_EPSILON = 1e-6
_GELU2_SLOPE = 1.702


class GELU2(nn.Module):
    """x * sigmoid(1.702 x), the activation of all published weights; CLIP calls it QuickGELU."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply the activation elementwise."""
        return _GELU2.apply(x)


class _GELU2(torch.autograd.Function):
    """silu(ax) / a, with the derivative of silu at ax: one saved tensor, one pass in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        scaled = _GELU2_SLOPE * x
        ctx.save_for_backward(scaled)
        return functional.silu(scaled).div_(_GELU2_SLOPE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0], scaled)


class ImageEmbedding(nn.Module):
    """Token embedding with 2-D positions: code + row + column; the last row of the code table is the mask.

    Args:
        codes: K, the number of codes without the mask.
        grid: Height and width in tokens.
        width: Embedding width.
        position_grid: Rows and columns of the position tables, see `DenoiserConfig.position_grid`.

    Raises:
        UserError: The position tables have fewer positions than the grid has tokens.
    """

    def __init__(
        self, codes: int, grid: tuple[int, int], width: int, position_grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        rows, self.columns = position_grid or grid
        self.length = grid[0] * grid[1]
        if rows * self.columns < self.length:
            raise UserError(
                f"denoiser.position_grid: {rows}x{self.columns} positions are too few for a grid of "
                f"{grid[0]}x{grid[1]} tokens; leave it out."
            )
        self.emb = nn.Embedding(codes + 1, width)
        self.height_emb = nn.Embedding(rows, width)
        self.width_emb = nn.Embedding(self.columns, width)

    def positions(self) -> Float[Tensor, "length width"]:
        """Return the positional embeddings in raster order."""
        position = torch.arange(self.length, device=self.height_emb.weight.device)
        return self.height_emb(position // self.columns) + self.width_emb(position % self.columns)

    def forward(self, tokens: Tokens) -> Hidden:
        """Embed tokens in raster order."""
        return self.emb(tokens) + self.positions()


class Modulation(NamedTuple):
    """Replacement of a LayerNorm's weight and bias, per sample or shared by the batch.

    Attributes:
        scale: Multiplier of the normalized input, 1 + the predicted scale; [batch, width] or [width].
        shift: Offset after scaling, in the shape of ``scale``.
    """

    scale: Tensor
    shift: Tensor


def modulate(x: Hidden, modulation: Modulation) -> Hidden:
    """Compute LN(x) * scale + shift, LN without affine weights (AdaLN, arXiv 2111.14822, section 4.2)."""
    scale, shift = modulation
    if scale.ndim == 1:
        return functional.layer_norm(x, x.shape[-1:], scale, shift)
    return torch.addcmul(shift[:, None], functional.layer_norm(x, x.shape[-1:]), scale[:, None])


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm modulated by an id, a timestep or a class: LN(x)(1 + scale) + shift.

    Args:
        emb: Embedding of ids [batch] as vectors [batch, width].
        width: Feature width.
    """

    def __init__(self, emb: nn.Module, width: int) -> None:
        super().__init__()
        self.emb = emb
        self.linear = nn.Linear(width, 2 * width)

    def modulation(self, ids: Int[Tensor, " batch"]) -> Modulation:
        """Compute scale and shift [batch, width] of each id."""
        embedded = functional.silu(self.emb(ids)).to(self.linear.weight.dtype)
        scale, shift = self.linear(embedded).chunk(2, dim=-1)
        return Modulation(1 + scale, shift)

    def forward(self, x: Hidden, ids: Int[Tensor, " batch"]) -> Hidden:
        """Normalize each position with the modulation of its sample's id."""
        return modulate(x, self.modulation(ids))


class ClassEmbedding(nn.Embedding):
    """Class embedding in which the id ``classes`` stands for "none".

    Args:
        classes: Number of classes.
        width: Embedding width.
        null: Embedding of "none": a learned row, or the mean of all classes.
    """

    def __init__(self, classes: int, width: int, null: NullClass) -> None:
        super().__init__(classes + 1 if null == "learned" else classes, width)
        self.classes = classes

    def forward(self, input: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Embed the class of each sample."""
        if self.num_embeddings > self.classes:
            return super().forward(input)
        is_class = input < self.classes
        embedded = super().forward(torch.where(is_class, input, 0))
        return torch.where(is_class[:, None], embedded, self.weight.mean(dim=0))


class SinusoidalEmbedding(nn.Module):
    """Sinusoidal timestep embedding: sine and cosine of t / T * 4000 at geometric frequencies."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.width = width
        self.steps = steps

    def forward(self, t: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Embed timesteps in float32."""
        half = self.width // 2
        frequencies = torch.arange(half, device=t.device) * (-math.log(_SINUSOID_PERIOD) / (half - 1))
        angles = (t / self.steps * _SINUSOID_SCALE)[:, None] * frequencies.exp()[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class KeysValues(NamedTuple):
    """Keys and values of a context, each [batch, positions, heads, dim]; constant for a prompt."""

    keys: Tensor
    values: Tensor


class Rotation(NamedTuple):
    """Cosines and sines, each [length, 1, dim / 2], of the angles of 2-D RoPE."""

    cosine: Tensor
    sine: Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], dim: int, like: Tensor) -> "Rotation":
        """Compute the angles of a grid in raster order: first half of the pairs by row, second by column.

        Args:
            grid: Height and width in tokens.
            dim: Features per head, a multiple of 4.
            like: Tensor with the target device and dtype.
        """
        pairs = dim // 4
        frequencies = _ROTATION_BASE ** -(torch.arange(pairs, device=like.device) / pairs)
        position = torch.arange(grid[0] * grid[1], device=like.device)[:, None]
        rows, columns = position // grid[1], position % grid[1]
        angles = torch.cat([rows * frequencies, columns * frequencies], dim=-1)[:, None]
        return cls(angles.cos().to(like.dtype), angles.sin().to(like.dtype))

    def __call__(self, x: Float[Tensor, "batch length heads dim"]) -> Float[Tensor, "batch length heads dim"]:
        """Rotate the pairs (i, i + dim / 2) of each head's features."""
        first, second = x.chunk(2, dim=-1)
        rotated = first * self.cosine - second * self.sine, second * self.cosine + first * self.sine
        return torch.cat(rotated, dim=-1)


class Attention(nn.Module):
    """Multi-head attention; queries from ``width``, keys and values from ``context_width``.

    Args:
        width: Feature width of queries and output.
        heads: Number of heads; must divide ``width``.
        context_width: Feature width of keys and values.
        backend: Attention backend, see `vqd_scale.nn.attention`.
        qk_norm: RMS-normalize each head's queries and keys (QK-norm, arXiv 2302.05442).
    """

    def __init__(
        self, width: int, heads: int, context_width: int, backend: AttentionBackend, *, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.proj = nn.Linear(width, width)
        self.heads = heads
        self.backend: AttentionBackend = backend
        self.qk_norm = qk_norm
        if qk_norm:
            self.query_norm = nn.RMSNorm(width // heads, eps=_NORM_EPSILON)
            self.key_norm = nn.RMSNorm(width // heads, eps=_NORM_EPSILON)

    def keys_values(
        self, context: Float[Tensor, "batch keys context_width"], rotation: Rotation | None = None
    ) -> KeysValues:
        """Compute the keys and values of a context, cacheable while the context stays the same."""
        keys = self.key(context).unflatten(-1, (self.heads, -1))
        if self.qk_norm:
            keys = self.key_norm(keys)
        values = self.value(context).unflatten(-1, (self.heads, -1))
        return KeysValues(keys if rotation is None else rotation(keys), values)

    def attend(
        self,
        x: Hidden,
        context: KeysValues,
        rotation: Rotation | None = None,
        *,
        causal: bool = False,
    ) -> Hidden:
        """Attend from each position of ``x`` to given keys and values, see `nn.attention.attention`."""
        query = self.query(x).unflatten(-1, (self.heads, -1))
        if self.qk_norm:
            query = self.query_norm(query)
        if rotation is not None:
            query = rotation(query)
        attended = attention(query, context.keys, context.values, self.backend, causal=causal)
        return self.proj(attended.flatten(-2))

    def forward(
        self,
        x: Hidden,
        context: Float[Tensor, "batch keys context_width"],
        rotation: Rotation | None = None,
        *,
        causal: bool = False,
    ) -> Hidden:
        """Attend from each position of ``x`` to all of ``context`` (pass ``x`` twice for self-attention)."""
        return self.attend(x, self.keys_values(context, rotation), rotation, causal=causal)


class FeedForward(nn.Sequential):
    """Position-wise feed-forward: Linear, GELU2, Linear."""

    def __init__(self, width: int, multiplier: int) -> None:
        super().__init__(nn.Linear(width, multiplier * width), GELU2(), nn.Linear(multiplier * width, width))


class ConvolutionalFeedForward(nn.Sequential):
    """Convolutional feed-forward over the token grid: Conv3x3, GELU2, Conv3x3."""

    def __init__(self, width: int, multiplier: int, grid: tuple[int, int]) -> None:
        super().__init__(
            nn.Conv2d(width, multiplier * width, 3, padding=1),
            GELU2(),
            nn.Conv2d(multiplier * width, width, 3, padding=1),
        )
        self.grid = grid

    def forward(self, input: Hidden) -> Hidden:
        """Reshape the raster order to the grid, convolve, and flatten."""
        image = input.transpose(1, 2).unflatten(-1, self.grid)
        return super().forward(image).flatten(2).transpose(1, 2)


def build_timestep_embedding(kind: TimestepEmbedding, width: int, steps: int) -> nn.Module:
    """Build a timestep embedding: a table of T rows (all published weights), or sinusoids."""
    return nn.Embedding(steps, width) if kind == "learned" else SinusoidalEmbedding(width, steps)


def build_feed_forward(config: FeedForwardConfig, width: int, grid: tuple[int, int]) -> nn.Module:
    """Build the configured feed-forward module."""
    if isinstance(config, Convolutional):
        return ConvolutionalFeedForward(width, config.mlp_ratio, grid)
    return FeedForward(width, config.mlp_ratio)


@torch.no_grad()
def init_weights(network: nn.Module, std: float) -> None:
    """Initialize linear and embedding weights with standard deviation ``std``, and biases with zero.

    Convolutions keep torch's default, as published.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            with gather(module.parameters(recurse=False)):
                # Sampled in float32 on the CPU, so that weights are equal with and without sharding.
                module.weight.copy_(torch.empty(module.weight.shape).normal_(std=std))
                if isinstance(module, nn.Linear):
                    module.bias.zero_()


@torch.no_grad()
def init_from_codebook(
    tables: Sequence[Float[Tensor, "rows width"]], vectors: Float[Tensor, "codes code_width"], std: float
) -> None:
    """Initialize a network's code tables as random rotations of the tokenizer's code vectors.

    Similar codes get similar initial embeddings, for runs too short to learn the similarity from images. All
    weights stay trainable.

    Args:
        tables: Weights whose first rows belong to the codes; these rows are overwritten.
        vectors: Code vectors of the tokenizer, no wider than the network.
        std: Standard deviation of the weights along each rotated direction.
    """
    whitened = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0)
    with gather(tables):
        for weight in tables:
            rotation = nn.init.orthogonal_(torch.empty(vectors.shape[1], weight.shape[1]))
            weight[: len(vectors)].copy_(whitened @ rotation * std)
