"""What a trained model is on disk: a folder of safetensors and one JSON that says everything else."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqd_scale.core.config import Config, ConfigType, validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.store import publish_json, published_folder, read_json, sha256_of
from vqd_scale.diffusion.schedule import Schedule
from vqd_scale.nn.denoiser import Denoiser, DenoiserConfig, TextCondition
from vqd_scale.text.clip import TextConfig, TextEncoder
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_TOKENIZER = "tokenizer"


class BundleConfig(Config):
    """All that a model's weights need to mean something, the schedule's constants among it."""

    codes: PositiveInt
    """K, the number of codes."""
    grid: tuple[PositiveInt, PositiveInt]
    """Rows and columns of tokens."""
    denoiser: DenoiserConfig
    text: TextConfig
    diffusion: Schedule


class Model(nn.Module):
    """Denoiser and text encoder, what is trained together and saved together.

    Args:
        config: Their shapes.

    Raises:
        UserError: The denoiser does not take text, or text of another width.
    """

    def __init__(self, config: BundleConfig) -> None:
        super().__init__()
        self.text = TextEncoder(config.text)
        condition = config.denoiser.condition
        if not isinstance(condition, TextCondition) or condition.width != self.text.width:
            raise UserError(
                f"denoiser.condition: must be kind 'text' of width {self.text.width}, the text encoder's, "
                f"not {condition!r}."
            )
        self.denoiser = Denoiser(config.denoiser, config.codes, config.grid, config.diffusion.steps)


@dataclass(frozen=True)
class Bundle:
    """A loaded model.

    Attributes:
        config: Its shapes and schedule.
        model: Denoiser and text encoder, in evaluation mode.
        tokenizer: Tokens to pictures.
    """

    config: BundleConfig
    model: Model
    tokenizer: VQGAN


def save_bundle(folder: Path, config: BundleConfig, weights: Mapping[str, Tensor], tokenizer: Path) -> None:
    """Write a model's bundle, the tokenizer's within it.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    with published_folder(folder) as partial:
        _save(partial, config, weights)
        shutil.copytree(tokenizer, partial / _TOKENIZER)


def load_bundle(folder: Path, device: torch.device) -> Bundle:
    """Read a model's bundle, or that of a finished run.

    Raises:
        UserError: There is none, or a file is missing, damaged or of another shape.
    """
    if (folder / "export").is_dir():
        folder = folder / "export"
    config = _load_config(BundleConfig, folder, "model bundle")
    model = Model(config)
    _load_weights(model, folder)
    return Bundle(
        config, model.to(device).eval().requires_grad_(False), load_tokenizer(folder / _TOKENIZER, device)
    )


def save_tokenizer(folder: Path, config: VQGANConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a tokenizer's bundle.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    with published_folder(folder) as partial:
        _save(partial, config, weights)


def load_tokenizer(folder: Path, device: torch.device) -> VQGAN:
    """Read a tokenizer's bundle.

    Raises:
        UserError: There is none, or a file is missing, damaged or of another shape.
    """
    tokenizer = VQGAN(_load_config(VQGANConfig, folder, "tokenizer bundle"))
    _load_weights(tokenizer, folder)
    return tokenizer.to(device).eval().requires_grad_(False)


def tokenizer_fingerprint(folder: Path) -> str:
    """Hex SHA-256 of a tokenizer's weights: token shards carry it, and training checks it.

    Raises:
        UserError: There is no tokenizer bundle in the folder.
    """
    if not (folder / _WEIGHTS).is_file():
        raise UserError(f"{folder}: there is no tokenizer bundle here; train_tokenizer.py makes one.")
    return sha256_of(folder / _WEIGHTS)


def _save(folder: Path, config: Config, weights: Mapping[str, Tensor]) -> None:
    publish_json(folder / _CONFIG, config.model_dump(mode="json"))
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / _WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder}: the weights cannot be written ({error}); free some space.") from None


def _load_config(kind: type[ConfigType], folder: Path, what: str) -> ConfigType:
    values: Any = read_json(folder / _CONFIG, what)
    return validated(kind, values, str(folder / _CONFIG))


def _load_weights(module: nn.Module, folder: Path) -> None:
    path = folder / _WEIGHTS
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: the weights are missing; export or copy the bundle again.") from None
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: the weights do not fit their config.json or are damaged ({reason})."
        ) from None
