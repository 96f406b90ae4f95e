"""Every tokenizer of this package by its configuration."""

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
    """A tokenizer with the codes left out that a data set hardly uses."""

    kind: Literal["reduced"] = "reduced"
    codebook_size: PositiveInt
    """K, how many ids are left, the unused bucket among them."""
    unused: Unused = "bucket"
    """What became of unused codes."""
    full: FullTokenizerConfig
    """The tokenizer with all its codes."""


TokenizerConfig = Annotated[
    VQGANConfig | TamingVQConfig | TamingGumbelConfig | FSQConfig | ReducedConfig, Field(discriminator="kind")
]
Tokenizer = FullTokenizer | Reduced


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of random weights; its state dictionary is what a bundle holds.

    Raises:
        UserError: More codes are to be left than there are.
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
