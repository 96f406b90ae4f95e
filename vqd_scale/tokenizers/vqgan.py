"""VQ-GAN autoencoder (Esser et al., arXiv 2012.09841) with an EMA codebook."""

from vqd_scale.tokenizers.autoencoder import StraightThrough
from vqd_scale.tokenizers.codebook.quantizer import Codebook
from vqd_scale.tokenizers.config import VQGANConfig


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
