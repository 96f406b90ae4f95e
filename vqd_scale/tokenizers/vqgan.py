"""VQ-GAN's autoencoder (Esser et al., arXiv 2012.09841) around a codebook of moving averages."""

from typing import Literal

from pydantic import Field, PositiveInt

from vqd_scale.tokenizers.autoencoder import StraightThrough
from vqd_scale.tokenizers.codebook import Codebook
from vqd_scale.tokenizers.convolutions import ConvolutionsConfig


class VQGANConfig(ConvolutionsConfig):
    """Shape of an autoencoder to train here; that of VQ-Diffusion's own tokenizers is among them."""

    kind: Literal["vqgan"] = "vqgan"
    codes: PositiveInt = 8192
    code_width: PositiveInt = 256
    codebook_decay: float = Field(default=0.99, ge=0, lt=1)
    revival_share: float = Field(default=0.03, ge=0, lt=1)


ITHQ = VQGANConfig(
    codes=4096,
    code_width=128,
    channels=64,
    multipliers=(1, 2, 4, 8),
    attention=(3,),
    middle=True,
    latent_width=256,
)
"""Microsoft's tokenizer of the ITHQ model: 8 pixels a token."""


class VQGAN(StraightThrough[Codebook]):
    """Encoder, codebook and decoder.

    Args:
        config: The autoencoder's shape.
    """

    def __init__(self, config: VQGANConfig) -> None:
        codebook = Codebook(config.codes, config.code_width, config.codebook_decay, config.revival_share)
        super().__init__(config, config.code_width, codebook)
        self.config = config
