"""VQ-GAN autoencoder (Esser et al., arXiv 2012.09841) with an EMA codebook."""

from typing import Literal

from pydantic import Field, PositiveInt

from vqd_scale.tokenizers.autoencoder import StraightThrough
from vqd_scale.tokenizers.codebook.quantizer import Codebook
from vqd_scale.tokenizers.convolutions import ConvolutionsConfig


class VQGANConfig(ConvolutionsConfig):
    """Architecture of a VQ-GAN trained here; covers VQ-Diffusion's own tokenizers."""

    kind: Literal["vqgan"] = "vqgan"
    codebook_size: PositiveInt = 8192
    code_dim: PositiveInt = 256
    codebook_decay: float = Field(default=0.99, ge=0, lt=1)
    dead_code_reset_fraction: float = Field(default=0.03, ge=0, lt=1)


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


class VQGAN(StraightThrough[Codebook]):
    """Encoder, EMA codebook and decoder.

    Args:
        config: Architecture of the autoencoder.
    """

    def __init__(self, config: VQGANConfig) -> None:
        codebook = Codebook(
            config.codebook_size, config.code_dim, config.codebook_decay, config.dead_code_reset_fraction
        )
        super().__init__(config, config.code_dim, codebook)
        self.config = config
