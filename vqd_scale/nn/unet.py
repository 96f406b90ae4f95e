"""Convolutional U-Net of VQ-DDM (Hu et al., arXiv 2112.01799) over the embeddings of a token grid.

The U-Net replaces the transformer under every schedule, objective and sampler. The paper leaves some of the
shape open. This implementation matches the paper's size of 117M (117,586,568 at K = 1024 without the mask's
row): skip connections concatenate the features of the coarser levels but not of the full resolution, and one
more convolution precedes the 1x1 head. The paper's "noise" variant, which adds the one-hot x_t to the logits,
is not implemented: `HeadFunction` requires a linear map of the hidden states.
"""

from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.nn.config import UNET_GROUPS, ClassCondition, UNetConfig
from vqd_scale.nn.denoiser import HeadFunction, Output, PreparedNetwork, TokenHead
from vqd_scale.nn.layers import ClassEmbedding, SinusoidalEmbedding, Tokens

_HEADS = 4
_HEAD_WIDTH = 32
_TIME_MULTIPLIER = 4

Image: TypeAlias = Float[Tensor, "batch channels height width"]
Signal: TypeAlias = Float[Tensor, "batch signal"]
"""Conditioning vector of an image: its timestep, plus its class in class-conditional models."""


class Convolution(nn.Sequential):
    """Conv3x3, GroupNorm, Mish."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(UNET_GROUPS, out), nn.Mish())


class UNetResidualBlock(nn.Module):
    """Residual block: two convolutions with the signal added between them, and a shortcut."""

    def __init__(self, channels: int, out: int, signal: int) -> None:
        super().__init__()
        self.first = Convolution(channels, out)
        self.signal = nn.Sequential(nn.Mish(), nn.Linear(signal, out))
        self.second = Convolution(out, out)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, image: Image, signal: Signal) -> Image:
        """Apply the block."""
        hidden = self.first(image) + self.signal(signal)[:, :, None, None]
        return self.second(hidden) + self.shortcut(image)


class LinearAttention(nn.Module):
    """Residual attention with cost linear in the number of positions, and a zero-initialized gate.

    Keys have a softmax over positions, queries have none: softmax(K) V^T is one matrix for all queries
    (efficient attention, arXiv 1812.01243; gate from ReZero, arXiv 2003.04887).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projections = nn.Conv2d(channels, 3 * _HEADS * _HEAD_WIDTH, 1, bias=False)
        self.proj = nn.Conv2d(_HEADS * _HEAD_WIDTH, channels, 1)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, image: Image) -> Image:
        """Apply the attention."""
        heads = self.projections(image).flatten(2).unflatten(1, (3, _HEADS, _HEAD_WIDTH))
        query, key, value = heads.unbind(1)
        summary = value @ key.softmax(dim=-1).transpose(-1, -2)
        attended = (summary @ query).flatten(1, 2).unflatten(-1, image.shape[-2:])
        return image + self.gate * self.proj(attended)


class UNetLevel(nn.Module):
    """One resolution of the U-Net: two residual blocks, then attention over all positions.

    Args:
        channels: Input channels.
        out: Output channels.
        signal: Width of the signal.
    """

    def __init__(self, channels: int, out: int, signal: int) -> None:
        super().__init__()
        self.first = UNetResidualBlock(channels, out, signal)
        self.second = UNetResidualBlock(out, out, signal)
        self.attention = LinearAttention(out)

    def forward(self, image: Image, signal: Signal) -> Image:
        """Apply the blocks and the attention."""
        return self.attention(self.second(self.first(image, signal), signal))


class UNet(nn.Module):
    """Network of VQ-DDM: noisy tokens -> logits of p(x0 | x_t).

    Args:
        config: Shape of the network.
        codes: K, the number of codes; the mask has id K and no logit.
        grid: Height and width in tokens.
        steps: T, the number of timesteps.

    Raises:
        UserError: The grid cannot be halved once per downsampling.
    """

    units: ClassVar[tuple[type[nn.Module], ...]] = (UNetResidualBlock, LinearAttention)

    def __init__(self, config: UNetConfig, codes: int, grid: tuple[int, int], steps: int) -> None:
        super().__init__()
        halvings = len(config.channel_multipliers) - 1
        if grid[0] % 2**halvings or grid[1] % 2**halvings:
            raise UserError(
                f"denoiser.channel_multipliers: a grid of {grid[0]}x{grid[1]} tokens cannot be halved "
                f"{halvings} times; give fewer multipliers, or images of another size."
            )
        self.grid = grid
        width = config.width
        self.content_emb = nn.Embedding(codes + 1, width)
        self.time = SinusoidalEmbedding(width, steps)
        self.time_mlp = nn.Sequential(
            nn.Linear(width, _TIME_MULTIPLIER * width), nn.Mish(), nn.Linear(_TIME_MULTIPLIER * width, width)
        )
        self.class_emb: ClassEmbedding | None = None
        if isinstance(config.condition, ClassCondition):
            self.class_emb = ClassEmbedding(config.condition.classes, width, config.condition.null_condition)
        widths = [width * multiplier for multiplier in config.channel_multipliers]
        deepest = widths[-1]
        self.down = nn.ModuleList(UNetLevel(*pair, width) for pair in pairwise([width, *widths]))
        self.downsample = nn.ModuleList(nn.Conv2d(out, out, 3, stride=2, padding=1) for out in widths[:-1])
        self.middle = nn.ModuleList(UNetResidualBlock(deepest, deepest, width) for _ in range(2))
        self.middle_attention = LinearAttention(deepest)
        upwards = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(UNetLevel(2 * coarse, fine, width) for coarse, fine in upwards)
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(out, out, 4, 2, padding=1) for _, out in upwards)
        self.last = Convolution(widths[0], widths[0])
        self.head = TokenHead(widths[0], codes)

    @property
    def code_embeddings(self) -> tuple[Tensor, Tensor]:
        """Weights of embedding and head; the first K rows belong to the codes."""
        return self.content_emb.weight, self.head.weight

    def prepare(self, condition: Tensor | None) -> PreparedNetwork:
        """Return a function (tokens, timestep of the whole batch) -> logits under one condition.

        Nothing is cached: unlike the transformer's, the U-Net's steps share hardly any computation.
        """

        @torch.no_grad()
        def evaluate(tokens: Tokens, t: int) -> Float[Tensor, "batch length codes"]:
            return self(tokens, tokens.new_full((len(tokens),), t), condition)

        return evaluate

    def forward(
        self,
        tokens: Tokens,
        t: Int[Tensor, " batch"],
        condition: Int[Tensor, " batch"] | None,
        head_function: HeadFunction[Output] | None = None,
    ) -> Tensor | Output:
        """Predict the clean tokens; arguments and result as in `Denoiser.forward`, without text features."""
        image = self.content_emb(tokens).transpose(1, 2).unflatten(-1, self.grid)
        signal = self.time_mlp(self.time(t).to(image.dtype))
        if self.class_emb is not None:
            signal = signal + self.class_emb(condition)
        hidden = self._forward_features(image, signal).flatten(2).transpose(1, 2)
        return self.head(hidden, head_function)

    def _forward_features(self, image: Image, signal: Signal) -> Image:
        features: list[Tensor] = []
        for number, level in enumerate(self.down):
            if number:
                image = self.downsample[number - 1](image)
            image = level(image, signal)
            features.append(image)
        first, second = self.middle
        image = second(self.middle_attention(first(image, signal)), signal)
        for level, upsample in zip(self.up, self.upsample, strict=True):
            image = upsample(level(torch.cat([image, features.pop()], dim=1), signal))
        return self.last(image)
