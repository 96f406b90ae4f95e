"""VQ-GAN's autoencoder (Esser et al., arXiv 2012.09841): convolutions around a codebook."""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.config import Config
from vqd_scale.tokenizers.codebook import Codebook

_GROUPS = 32
_EPSILON = 1e-6


class VQGANConfig(Config):
    """Shape of the autoencoder.

    One token spans ``patch * 2 ** (len(multipliers) - 1)`` pixels in each direction.
    """

    codes: PositiveInt = 8192
    code_width: PositiveInt = 256
    channels: PositiveInt = 128
    multipliers: tuple[PositiveInt, ...] = Field(default=(1, 1, 2, 4), min_length=1)
    residual_blocks: PositiveInt = 2
    patch: PositiveInt = 1
    """Side of the pixel blocks folded into channels at the entrance; 1 as published, more is cheaper."""
    norm: Literal["group", "none"] = "group"
    codebook_decay: float = Field(default=0.99, ge=0, lt=1)
    revival_share: float = Field(default=0.03, ge=0, lt=1)

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> "VQGANConfig":
        if self.norm == "group" and self.channels % _GROUPS:
            raise ValueError(f"channels {self.channels} must be a multiple of {_GROUPS} under norm 'group'")
        return self


class Reconstruction(NamedTuple):
    """What one pass through the autoencoder gives.

    Attributes:
        images: [batch, 3, height, width] in about [-1, 1].
        latents: Encoder outputs [batch * rows * columns, code_width].
        ids: Their codes [batch * rows * columns]; all zero while not quantised.
        commitment: Mean squared distance of each sample's latents to their codes, [batch].
    """

    images: Tensor
    latents: Tensor
    ids: Tensor
    commitment: Tensor


class VQGAN(nn.Module):
    """Encoder, codebook and decoder.

    Args:
        config: The autoencoder's shape.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Codebook(config.codes, config.code_width, config.codebook_decay, config.revival_share)
        self.decoder = Decoder(config)

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.config.codes

    @property
    def factor(self) -> int:
        """How many pixels one token spans in each direction."""
        return self.config.patch * 2 ** (len(self.config.multipliers) - 1)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], *, quantised: bool = True
    ) -> Reconstruction:
        """Reconstruct images; gradients pass the codebook straight through.

        Args:
            images: Float images in [-1, 1]; height and width multiples of `factor`.
            quantised: False leaves the codebook out, for the first steps of a training.
        """
        z = self.encoder(images)
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        if not quantised:
            ids = torch.zeros(len(flat), dtype=torch.int64, device=z.device)
            return Reconstruction(self.decoder(z), flat, ids, z.new_zeros(len(z)))
        ids = self.quantize.nearest(flat.detach())
        chosen = (
            self.quantize.lookup(ids).unflatten(0, (z.shape[0], z.shape[2], z.shape[3])).permute(0, 3, 1, 2)
        )
        commitment = (z - chosen).square().flatten(1).mean(dim=1)
        return Reconstruction(self.decoder(z + (chosen - z).detach()), flat, ids, commitment)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch rows columns"]:
        """Images in [-1, 1] to codes 0..K-1."""
        z = self.encoder(images)
        ids = self.quantize.nearest(z.permute(0, 2, 3, 1).flatten(0, 2))
        return ids.unflatten(0, (z.shape[0], z.shape[2], z.shape[3]))

    def decode(self, tokens: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Codes to images in about [-1, 1]."""
        return self.decoder(self.quantize.lookup(tokens).permute(0, 3, 1, 2))


class Encoder(nn.Module):
    """Images to latents: at each level residual blocks, then half the resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.patch = nn.PixelUnshuffle(config.patch)
        self.conv_in = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        width = widths[0]
        for level, following in enumerate(widths):
            blocks = _residual_stack(width, following, config.residual_blocks, config.norm)
            if level < len(widths) - 1:
                blocks.append(Downsample(following))
            self.down.append(blocks)
            width = following
        self.norm_out = _norm(width, config.norm)
        self.conv_out = nn.Conv2d(width, config.code_width, 3, padding=1)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch code rows columns"]:
        """Encode images in [-1, 1]."""
        x = self.conv_in(self.patch(images))
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents to images: the encoder's levels in reverse, one residual block more at each."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.code_width, widths[0], 3, padding=1)
        self.up = nn.ModuleList()
        width = widths[0]
        for level, following in enumerate(widths):
            blocks = _residual_stack(width, following, config.residual_blocks + 1, config.norm)
            if level < len(widths) - 1:
                blocks.append(Upsample(following))
            self.up.append(blocks)
            width = following
        self.norm_out = _norm(width, config.norm)
        self.conv_out = nn.Conv2d(width, 3 * config.patch**2, 3, padding=1)
        self.patch = nn.PixelShuffle(config.patch)

    def forward(self, z: Float[Tensor, "batch code rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Decode latents."""
        x = self.conv_in(z)
        for level in self.up:
            x = level(x)
        return self.patch(self.conv_out(functional.silu(self.norm_out(x))))


class ResidualBlock(nn.Module):
    """Norm, SiLU, Conv3x3, twice, beside a shortcut."""

    def __init__(self, width: int, following: int, norm: Literal["group", "none"]) -> None:
        super().__init__()
        self.norm1 = _norm(width, norm)
        self.conv1 = nn.Conv2d(width, following, 3, padding=1)
        self.norm2 = _norm(following, norm)
        self.conv2 = nn.Conv2d(following, following, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == following else nn.Conv2d(width, following, 1)

    def forward(self, x: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch following h w"]:
        """One residual block."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(hidden)))


class Downsample(nn.Module):
    """Half the resolution: a strided convolution, padded at the right and bottom only as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width h/2 w/2"]:
        """Downsample by two."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbours, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width 2*h 2*w"]:
        """Upsample by two."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _residual_stack(width: int, following: int, count: int, norm: Literal["group", "none"]) -> nn.Sequential:
    widths = [width] + [following] * count
    return nn.Sequential(*(ResidualBlock(a, b, norm) for a, b in pairwise(widths)))


def _norm(width: int, norm: Literal["group", "none"]) -> nn.Module:
    return nn.GroupNorm(_GROUPS, width, eps=_EPSILON) if norm == "group" else nn.Identity()
