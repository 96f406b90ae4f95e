"""Configuration of the tokenizers and their losses, and the registry of their kinds; needs no torch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from vqd_scale.core.config import Config
from vqd_scale.core.safe_json import MAX_SIZE, Count, Size

if TYPE_CHECKING:
    from vqd_scale.tokenizers.codebook.reduction import Reduced
    from vqd_scale.tokenizers.fsq import FSQ
    from vqd_scale.tokenizers.perceptual import LPIPS, Pyramid
    from vqd_scale.tokenizers.taming import TamingGumbel, TamingVQ
    from vqd_scale.tokenizers.vqgan import VQGAN

NORM_GROUPS = 32


Norm = Literal["group", "none"]


class ConvolutionsConfig(Config):
    """Architecture of encoder and decoder, for any height and width that are multiples of `factor`."""

    channels: Size = 128
    """Base number of channels."""
    channel_multipliers: tuple[Count, ...] = Field(default=(1, 1, 2, 4), min_length=1, max_length=16)
    """Channels of each level, as multiples of ``channels``; every level except the last halves the
    resolution."""
    num_res_blocks: Annotated[int, Field(gt=0, le=64)] = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    patch_size: Count = 1
    """Side of the pixel blocks folded into channels at the input; 1 as published, larger is cheaper."""
    norm: Norm = "group"
    """Normalization before each convolution: GroupNorm with 32 groups, as published, or none, which is faster
    on a CPU."""
    attention: tuple[NonNegativeInt, ...] = ()
    """Levels with self-attention after each residual block; 0 is the finest."""
    mid_attention: bool = False
    """Add two residual blocks around self-attention at the coarsest level, as published."""
    latent_channels: Size | None = None
    """Channels between the convolutions and the codebook's 1x1 convolutions (``z_channels``). ``null``: no
    1x1 convolutions."""

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels per token in each direction."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @model_validator(mode="after")
    def _channels_and_levels_fit(self) -> Self:
        if self.norm == "group" and self.channels % NORM_GROUPS:
            raise ValueError(
                f"channels {self.channels} must be a multiple of {NORM_GROUPS} under norm 'group'"
            )
        if any(level >= len(self.channel_multipliers) for level in self.attention):
            raise ValueError(
                f"attention {list(self.attention)} must name levels below "
                f"{len(self.channel_multipliers)}, the number of multipliers"
            )
        return self


class VQGANConfig(ConvolutionsConfig):
    """Architecture of a VQ-GAN trained here; covers VQ-Diffusion's own tokenizers."""

    kind: Literal["vqgan"] = "vqgan"
    codebook_size: Size = 8192
    """K, the number of codes."""
    code_dim: Size = 256
    """Channels of a code vector."""
    codebook_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moving averages of the codes per step."""
    dead_code_reset_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Cluster size, as a fraction of the mean, below which a code is dead and replaced at a reset; 0 disables
    resets."""

    def build(self) -> "VQGAN":
        """Build the tokenizer with random weights; a bundle contains its state dictionary."""
        from vqd_scale.tokenizers.vqgan import VQGAN

        return VQGAN(self)


ITHQ = VQGANConfig(
    codebook_size=4096,
    code_dim=128,
    channels=64,
    channel_multipliers=(1, 2, 4, 8),
    attention=(3,),
    mid_attention=True,
    latent_channels=256,
)
"""Microsoft's tokenizer of the ITHQ model: one token per 8 x 8 pixels."""


class _TamingConfig(ConvolutionsConfig):
    codebook_size: Size
    """K, the number of codes."""
    code_dim: Size = 256
    """Channels of a code vector."""
    attention: tuple[NonNegativeInt, ...] = (3,)
    """Levels with self-attention after each residual block; 0 is the finest."""
    mid_attention: bool = True
    """Add two residual blocks around self-attention at the coarsest level, as published."""
    latent_channels: Size | None = 256
    """Channels between the convolutions and the codebook's 1x1 convolutions (``z_channels``). ``null``: no
    1x1 convolutions."""


class TamingVQConfig(_TamingConfig):
    """Architecture of a published VQ-GAN with a nearest-vector codebook; f8 by default."""

    kind: Literal["taming_vq"] = "taming_vq"

    def build(self) -> "TamingVQ":
        """Build the tokenizer with random weights; a bundle contains its state dictionary."""
        from vqd_scale.tokenizers.taming import TamingVQ

        return TamingVQ(self)


class TamingGumbelConfig(_TamingConfig):
    """Architecture of a published VQ-GAN with a Gumbel codebook; f8 by default."""

    kind: Literal["taming_gumbel"] = "taming_gumbel"

    def build(self) -> "TamingGumbel":
        """Build the tokenizer with random weights; a bundle contains its state dictionary."""
        from vqd_scale.tokenizers.taming import TamingGumbel

        return TamingGumbel(self)


OPENIMAGES_GUMBEL_F8 = TamingGumbelConfig(codebook_size=8192)
"""``vqgan_gumbel_f8``; VQ-Diffusion's COCO, CUB-200 and CC models use it with 2887 remaining codes."""


IMAGENET_F16 = TamingVQConfig(codebook_size=16384, channel_multipliers=(1, 1, 2, 2, 4), attention=(4,))
"""``vqgan_imagenet_f16_16384``; VQ-Diffusion's ImageNet model uses it with 974 remaining codes."""


FFHQ_F16 = TamingVQConfig(codebook_size=1024, channel_multipliers=(1, 1, 2, 2, 4), attention=(4,))
"""First stage of the published FFHQ transformer; the architecture of ``vqgan_imagenet_f16_1024``."""


class FSQConfig(ConvolutionsConfig):
    """Architecture of an FSQ autoencoder; K is the product of the levels."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(8, 5, 5, 5), min_length=1)
    """Number of quantization levels of each latent channel; FSQ's paper recommends (8, 5, 5, 5) for about
    1,000 codes and (7, 5, 5, 5, 5) for about 4,000."""

    @field_validator("levels")
    @classmethod
    def _codes_are_plausible(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if (codes := math.prod(levels)) > MAX_SIZE:
            raise ValueError(f"{codes} codes, the product of the levels, are more than {MAX_SIZE}")
        return levels

    def build(self) -> "FSQ":
        """Build the tokenizer with random weights; a bundle contains its state dictionary."""
        from vqd_scale.tokenizers.fsq import FSQ

        return FSQ(self)


Unused = Literal["bucket", "nearest"]
"""Id of unused codes: one common id (as published), or the id of the nearest used code."""


FullTokenizerConfig = Annotated[
    VQGANConfig | TamingVQConfig | TamingGumbelConfig | FSQConfig, Field(discriminator="kind")
]


class ReducedConfig(Config):
    """Tokenizer reduced to the codes that a dataset uses."""

    kind: Literal["reduced"] = "reduced"
    codebook_size: Size
    """K, the number of reduced ids, including the unused bucket."""
    unused: Unused = "bucket"
    """Id of unused codes: one common bucket, as published, or the id of the nearest used code.
    `tools/reduce_codebook.py` writes it, like the other keys."""
    full: FullTokenizerConfig
    """Configuration of the tokenizer with all codes."""

    def build(self) -> "Reduced":
        """Build the tokenizer with random weights; a bundle contains its state dictionary.

        Raises:
            UserError: The reduced codebook is larger than the full one.
        """
        from vqd_scale.tokenizers.codebook.reduction import Reduced

        return Reduced(self.full.build(), self.codebook_size, self.unused)


TokenizerConfig = Annotated[
    VQGANConfig | TamingVQConfig | TamingGumbelConfig | FSQConfig | ReducedConfig, Field(discriminator="kind")
]
"""Tokenizers by kind. A new tokenizer is one class here, whose `build` returns the `ImageTokenizer`."""


class DiscriminatorConfig(Config):
    """Architecture of the patch discriminator."""

    channels: PositiveInt = Field(default=64, multiple_of=NORM_GROUPS)
    """Channels of the first convolution; a multiple of 32. Each further strided convolution doubles them, up
    to eight times as many."""
    layers: PositiveInt = 3
    """Number of strided convolutions after the first; 3 gives a receptive field of 70 pixels, 2 of 34."""


class LPIPSConfig(Config):
    """LPIPS (Zhang et al., arXiv 1801.03924) on VGG-16, the perceptual loss of VQ-GAN."""

    kind: Literal["lpips"] = "lpips"
    vgg: Path
    """torchvision's VGG-16 weights (``vgg16-397923af.pth``), .pth or .safetensors."""
    linear: Path | None = None
    """LPIPS' linear weights (``vgg.pth``, version 0.1). Default: the file in the package lpips."""

    def build(self) -> "LPIPS":
        """Load the network with frozen weights.

        Raises:
            UserError: A weights file is missing, damaged, or has other contents.
        """
        from vqd_scale.tokenizers.perceptual import load_lpips

        return load_lpips(self)


class PyramidConfig(Config):
    """Multi-scale edge differences, a substitute for LPIPS that needs no weights."""

    kind: Literal["pyramid"] = "pyramid"
    levels: Annotated[int, Field(ge=1)] = 3
    """Number of scales, each half as large as the previous one. Raise it for images larger than the
    demo's."""

    def build(self) -> "Pyramid":
        """Build the loss."""
        from vqd_scale.tokenizers.perceptual import Pyramid

        return Pyramid(self.levels)


PerceptualConfig = Annotated[LPIPSConfig | PyramidConfig, Field(discriminator="kind")]


CHAIN = 200
"""Length of AFK-MC² Markov chains, as in its authors' code and in VQ-DDM."""
