"""A conversion that is known but not yet done."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vqd_scale.models.bundle import (
    Bundle,
    BundleConfig,
    Model,
    TokenizerWeights,
    load_tokenizer,
    save_bundle,
    save_tokenizer,
)
from vqd_scale.models.exchange.key_mapping import Exchange, part_of, under
from vqd_scale.nn.network import build_network
from vqd_scale.text.clip import TextEncoder
from vqd_scale.tokenizers.registry import TokenizerConfig, build_tokenizer

MODEL = "model."
TOKENIZER = "tokenizer."


@dataclass(frozen=True)
class ModelPlan:
    """A whole model out of somebody else's files.

    Attributes:
        config: What the bundle will say of the model.
        tokenizer: What it will say of the tokenizer; or a tokenizer's bundle, where the files hold none.
        exchange: The weights; ours under `MODEL` and `TOKENIZER`.
    """

    config: BundleConfig
    tokenizer: TokenizerConfig | Path
    exchange: Exchange

    def bundle(self) -> Bundle:
        """The model, without writing it.

        Raises:
            UserError: Weights are missing, unknown or of another shape.
        """
        weights = self.exchange.weights()
        model = Model(self.config)
        model.load_state_dict(part_of(weights, MODEL))
        if isinstance(self.tokenizer, Path):
            return Bundle(self.config, model, load_tokenizer(self.tokenizer, torch.device("cpu")))
        tokenizer = build_tokenizer(self.tokenizer)
        tokenizer.load_state_dict(part_of(weights, TOKENIZER))
        return Bundle(self.config, model, tokenizer)

    def save(self, folder: Path) -> None:
        """Write the bundle.

        Raises:
            UserError: Weights are missing, unknown or of another shape, or the folder cannot be written.
        """
        weights = self.exchange.weights()
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, Path):
            tokenizer = TokenizerWeights(tokenizer, part_of(weights, TOKENIZER))
        save_bundle(folder, self.config, part_of(weights, MODEL), tokenizer)


@dataclass(frozen=True)
class TokenizerPlan:
    """A tokenizer out of somebody else's file.

    Attributes:
        config: What the bundle will say of it.
        exchange: The weights.
    """

    config: TokenizerConfig
    exchange: Exchange

    def save(self, folder: Path) -> None:
        """Write the bundle.

        Raises:
            UserError: Weights are missing, unknown or of another shape, or the folder cannot be written.
        """
        save_tokenizer(folder, self.config, self.exchange.weights())


Plan = ModelPlan | TokenizerPlan


def wanted_tokenizer(config: TokenizerConfig) -> dict[str, Tensor]:
    """Names and shapes of a tokenizer's weights, without values."""
    with torch.device("meta"):
        return build_tokenizer(config).state_dict()


def wanted_weights(config: BundleConfig, tokenizer: TokenizerConfig | Path) -> dict[str, Tensor]:
    """Names and shapes of a model's weights and, if it is not a bundle, its tokenizer's; without values."""
    # Not `Model` as a whole: the text encoder tokenizes something when it is made, which needs a real device.
    text = {} if config.text is None else TextEncoder(config.text).state_dict()
    with torch.device("meta"):
        network = build_network(config.denoiser, config.codebook_size, config.grid, config.diffusion.steps)
    return {
        **under(f"{MODEL}text.", text),
        **under(f"{MODEL}denoiser.", cast(nn.Module, network).state_dict()),
        **under(TOKENIZER, {} if isinstance(tokenizer, Path) else wanted_tokenizer(tokenizer)),
    }
