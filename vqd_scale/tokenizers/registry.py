"""Registry of tokenizers by configuration type."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vqd_scale.core.config import Config
from vqd_scale.tokenizers.codebook.reduction import Reduced, Unused
from vqd_scale.tokenizers.fsq import FSQ, FSQConfig
from vqd_scale.tokenizers.taming import TamingGumbel, TamingGumbelConfig, TamingVQ, TamingVQConfig
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

FullTokenizerConfig = Annotated[
    VQGANConfig | TamingVQConfig | TamingGumbelConfig | FSQConfig, Field(discriminator="kind")
]
FullTokenizer = VQGAN | TamingVQ | TamingGumbel | FSQ


class ReducedConfig(Config):
    """Tokenizer reduced to the codes that a dataset uses."""

    kind: Literal["reduced"] = "reduced"
    codebook_size: PositiveInt
    """K, the number of reduced ids, including the unused bucket."""
    unused: Unused = "bucket"
    """Treatment of unused codes."""
    full: FullTokenizerConfig
    """Configuration of the tokenizer with all codes."""


TokenizerConfig = Annotated[
    VQGANConfig | TamingVQConfig | TamingGumbelConfig | FSQConfig | ReducedConfig, Field(discriminator="kind")
]
Tokenizer = FullTokenizer | Reduced


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build a tokenizer with random weights; a bundle contains its state dictionary.

    Raises:
        UserError: The reduced codebook is larger than the full one.
    """
    if isinstance(config, ReducedConfig):
        return Reduced(_build_full(config.full), config.codebook_size, config.unused)
    return _build_full(config)


def _build_full(config: FullTokenizerConfig) -> FullTokenizer:
    match config:
        case VQGANConfig():
            return VQGAN(config)
        case TamingVQConfig():
            return TamingVQ(config)
        case TamingGumbelConfig():
            return TamingGumbel(config)
        case FSQConfig():
            return FSQ(config)
