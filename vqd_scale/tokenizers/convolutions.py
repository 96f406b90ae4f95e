"""VQ-GAN encoder and decoder (Esser et al., arXiv 2012.09841).

Module names follow the published checkpoints, so weights load without renaming.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.tokenizers.base import Images
from vqd_scale.tokenizers.config import NORM_GROUPS, ConvolutionsConfig, Norm

Features: TypeAlias = Float[Tensor, "batch channels rows columns"]

_EPSILON = 1e-6


class Encoder(nn.Module):
    """Images to latents: at each level residual blocks, then downsampling by two.

    Args:
        config: Architecture.
        width: Number of latent channels.
    """

    def __init__(self, config: ConvolutionsConfig, width: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.patch = nn.PixelUnshuffle(config.patch_size)
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownBlock(config, level, before, after, is_last=level == len(widths) - 1)
            for level, (before, after) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid = _middle(config, widths[-1])
        self.norm_out = _norm(widths[-1], config.norm)
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, images: Images) -> Features:
        """Encode images in [-1, 1], in the dtype of the weights."""
        x = self.conv_in(self.patch(images.to(self.conv_in.weight.dtype)))
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to images: the encoder's levels in reverse, with one more residual block each.

    Args:
        config: Architecture.
        width: Number of latent channels.
    """

    def __init__(self, config: ConvolutionsConfig, width: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(width, widths[-1], 3, padding=1)
        self.mid = _middle(config, widths[-1])
        upwards = range(len(widths) - 1, -1, -1)
        levels = [
            UpBlock(config, level, widths[min(level + 1, len(widths) - 1)], widths[level], is_last=level == 0)
            for level in upwards
        ]
        # Level 0 is the finest, as in the encoder; the decoder applies the levels in reverse order.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(widths[0], config.norm)
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch_size**2, 3, padding=1)
        self.patch = nn.PixelShuffle(config.patch_size)

    def forward(self, z: Features) -> Images:
        """Decode latents, in the dtype of the weights."""
        x = self.mid(self.conv_in(z.to(self.conv_in.weight.dtype)))
        for level in reversed(self.up):
            x = level(x)
        return self.patch(self.conv_out(functional.silu(self.norm_out(x))))


class ResolutionLevel(nn.Module):
    """Residual blocks of one resolution, each optionally followed by self-attention."""

    def __init__(
        self, config: ConvolutionsConfig, level: int, width: int, out_width: int, count: int
    ) -> None:
        super().__init__()
        attends = level in config.attention
        widths = [width] + [out_width] * count
        self.block = nn.ModuleList(ResidualBlock(a, b, config.norm) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(
            SpatialAttention(out_width, config.norm) for _ in range(count if attends else 0)
        )

    def forward(self, x: Features) -> Features:
        """Apply all blocks."""
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return x


class DownBlock(ResolutionLevel):
    """Encoder level."""

    def __init__(
        self, config: ConvolutionsConfig, level: int, width: int, out_width: int, *, is_last: bool
    ) -> None:
        super().__init__(config, level, width, out_width, config.num_res_blocks)
        self.downsample = nn.Identity() if is_last else Downsample(out_width)

    def forward(self, x: Features) -> Features:
        """Apply all blocks, then downsample by two."""
        return self.downsample(super().forward(x))


class UpBlock(ResolutionLevel):
    """Decoder level."""

    def __init__(
        self, config: ConvolutionsConfig, level: int, width: int, out_width: int, *, is_last: bool
    ) -> None:
        super().__init__(config, level, width, out_width, config.num_res_blocks + 1)
        self.upsample = nn.Identity() if is_last else Upsample(out_width)

    def forward(self, x: Features) -> Features:
        """Apply all blocks, then upsample by two."""
        return self.upsample(super().forward(x))


class ResidualBlock(nn.Module):
    """Residual block: (norm, SiLU, 3x3 convolution) twice."""

    def __init__(self, width: int, out_width: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = _norm(width, norm)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2 = _norm(out_width, norm)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)

    def forward(self, x: Features) -> Features:
        """Apply the block."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(hidden)))


class SpatialAttention(nn.Module):
    """Residual single-head self-attention over all positions of a feature map."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.norm = _norm(width, norm)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Features) -> Features:
        """Apply the block."""
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Downsampling by a strided convolution, padded only at the right and bottom, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Features) -> Features:
        """Downsample by two."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Upsampling by nearest-neighbor interpolation and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Features) -> Features:
        """Upsample by two."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(config: ConvolutionsConfig, width: int) -> nn.Module:
    if not config.mid_attention:
        return nn.Identity()
    return nn.Sequential(
        OrderedDict(
            block_1=ResidualBlock(width, width, config.norm),
            attn_1=SpatialAttention(width, config.norm),
            block_2=ResidualBlock(width, width, config.norm),
        )
    )


def _norm(width: int, norm: Norm) -> nn.Module:
    return nn.GroupNorm(NORM_GROUPS, width, eps=_EPSILON) if norm == "group" else nn.Identity()
