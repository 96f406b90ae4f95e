"""Import plans: configuration and key mapping of foreign weights, before conversion."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import with_prefix, without_prefix
from vqd_scale.models.bundle import (
    Bundle,
    Model,
    load_tokenizer,
    planned_weights,
    save_bundle,
    save_tokenizer,
)
from vqd_scale.models.config import BundleConfig
from vqd_scale.models.exchange.key_mapping import Exchange
from vqd_scale.tokenizers.config import TokenizerConfig

MODEL = "model."
TOKENIZER = "tokenizer."


@dataclass(frozen=True)
class ModelPlan:
    """Import plan of a complete model.

    Attributes:
        config: Configuration of the model.
        tokenizer: Configuration of the tokenizer; or the path of a tokenizer bundle, if the source files
            contain no tokenizer.
        exchange: Weights; target names start with `MODEL` and `TOKENIZER`.
    """

    config: BundleConfig
    tokenizer: TokenizerConfig | Path
    exchange: Exchange

    def bundle(self) -> Bundle:
        """Return the model without writing it; errors as for `Exchange.weights`."""
        weights = self.exchange.weights()
        model = Model(self.config)
        model.load_state_dict(without_prefix(weights, MODEL))
        if isinstance(self.tokenizer, Path):
            return Bundle(self.config, model, load_tokenizer(self.tokenizer, torch.device("cpu")))
        tokenizer = self.tokenizer.build()
        tokenizer.load_state_dict(without_prefix(weights, TOKENIZER))
        return Bundle(self.config, model, tokenizer)

    def save(self, folder: Path, purpose: str = "import") -> None:
        """Write the model bundle; errors as for `Exchange.weights` and `save_bundle`."""
        weights = self.exchange.weights()
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, Path):
            tokenizer = (tokenizer, without_prefix(weights, TOKENIZER))
        save_bundle(folder, self.config, without_prefix(weights, MODEL), tokenizer, purpose)


@dataclass(frozen=True)
class TokenizerPlan:
    """Import plan of a tokenizer.

    Attributes:
        config: Configuration of the tokenizer.
        exchange: Weights.
    """

    config: TokenizerConfig
    exchange: Exchange

    def save(self, folder: Path, purpose: str = "import") -> None:
        """Write the tokenizer bundle; errors as for `Exchange.weights` and `save_bundle`."""
        save_tokenizer(folder, self.config, self.exchange.weights(), purpose)


Plan = ModelPlan | TokenizerPlan


@contextmanager
def expected_shapes(source: str) -> Generator[None]:
    """Convert errors of an architecture that is inferred from weights, or given, to a `UserError`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{source}: {place}: given {first['input']!r:.99}: {message}.") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{source}: a weight has another shape than its name implies ({error}).") from None


def tokenizer_weights(config: TokenizerConfig, source: str) -> dict[str, Tensor]:
    """Return names and shapes of a tokenizer's weights; arguments and errors as for `planned_weights`."""
    return planned_weights(config.build, source)


def model_weights(config: BundleConfig, tokenizer: TokenizerConfig | Path, source: str) -> dict[str, Tensor]:
    """Return names and shapes of a model's weights, and of its tokenizer's unless that is a bundle."""
    codec = {} if isinstance(tokenizer, Path) else tokenizer_weights(tokenizer, source)
    model = planned_weights(lambda: Model(config), source)
    return {**with_prefix(MODEL, model), **with_prefix(TOKENIZER, codec)}
