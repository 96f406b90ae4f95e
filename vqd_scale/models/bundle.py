"""Model bundle: a folder of safetensors weights, ``config.json`` and a model card.

``config.json`` contains everything needed to use the weights. The weights' metadata contain the noise
schedule of their training, so a bundle with a changed schedule is rejected. ``README.md`` is the model card.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import TypeVar

from vqd_scale.core.atomic_io import publish_json, publish_text, read_json, sha256_of
from vqd_scale.core.config import Config, ConfigType, kinds_of, validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import published_folder
from vqd_scale.core.safe_json import JSON_OBJECT
from vqd_scale.core.tensors import check_finite, difference_of, read_tensors, write_tensors
from vqd_scale.diffusion.config import Schedule
from vqd_scale.models.config import AutoregressiveBundleConfig, BundleConfig
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.config import ClassCondition, Condition, TextCondition
from vqd_scale.nn.network import Network
from vqd_scale.reports.html import render
from vqd_scale.text.clip import TextEncoder
from vqd_scale.text.config import Pretrained, TextConfig
from vqd_scale.tokenizers.base import ImageTokenizer
from vqd_scale.tokenizers.config import TokenizerConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_CARD = "README.md"
_TOKENIZER = "tokenizer"
_SCHEDULE = "schedule"


class ConditionalModel(nn.Module):
    """Network and, for a text-conditional model, caption encoder; trained and saved together.

    Args:
        text: Configuration of the text encoder.
        condition: Condition of the network.
        key: Configuration key of the condition, for error messages.

    Attributes:
        condition: Condition of the network.
        text: Caption encoder; absent without a text condition.

    Raises:
        UserError: The network is text-conditional and there is no text encoder of its width, or it is not and
            there is a text encoder.
    """

    def __init__(self, text: TextConfig | None, condition: Condition, key: str) -> None:
        super().__init__()
        self.condition = condition
        if text is not None:
            self.text = TextEncoder(text)
        width = None if text is None else self.text.width
        if width != (condition.width if isinstance(condition, TextCondition) else None):
            requirement = "another kind than 'text'" if width is None else f"kind 'text' of width {width}"
            raise UserError(f"{key}: must be {requirement} to go with the text encoder, not {condition!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network; that of the text encoder can differ."""
        # By name: inside the engine's forward, DeepSpeed gathers a ZeRO-3 weight read as an attribute.
        return next(value.dtype for name, value in self.named_parameters() if not name.startswith("text."))

    def text_features(
        self, captions: Int[Tensor, "batch positions"], dropped: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch positions width"]:
        """Encode captions with `TextEncoder.forward`; return features in the dtype of the network.

        Args:
            captions: Token ids.
            dropped: Mask of the samples that get the null condition.
        """
        return self.text(captions, dropped).to(self.dtype)

    def condition_inputs(self, inputs: Tensor, dropped: Bool[Tensor, " batch"]) -> Tensor | None:
        """Compute the condition input of the network.

        Args:
            inputs: Caption ids [batch, positions] or classes [batch]; ignored by an unconditional model.
            dropped: Mask of the samples that get the null condition.
        """
        if isinstance(self.condition, TextCondition):
            return self.text_features(inputs, dropped)
        if isinstance(self.condition, ClassCondition):
            return torch.where(dropped, self.condition.classes, inputs)
        return None


class Model(ConditionalModel):
    """Denoiser and text encoder.

    Args:
        config: Configuration of both.

    Attributes:
        denoiser: Denoiser network.

    Raises:
        UserError: See `ConditionalModel`.
    """

    def __init__(self, config: BundleConfig) -> None:
        super().__init__(config.text, config.denoiser.condition, "denoiser.condition")
        self.denoiser = config.denoiser.build(config.codebook_size, config.grid, config.diffusion.steps)

    @property
    def network(self) -> Network:
        """The denoiser."""
        return self.denoiser


class AutoregressiveModel(ConditionalModel):
    """Autoregressive transformer and text encoder.

    Args:
        config: Configuration of both.

    Attributes:
        network: Autoregressive transformer.

    Raises:
        UserError: See `ConditionalModel`.
    """

    def __init__(self, config: AutoregressiveBundleConfig) -> None:
        super().__init__(config.text, config.network.condition, "network.condition")
        self.network = Autoregressive(config.network, config.codebook_size, config.grid)


_MODELS = (BundleConfig, AutoregressiveBundleConfig)
AnyBundleConfig = TypeVar("AnyBundleConfig", BundleConfig, AutoregressiveBundleConfig, default=BundleConfig)
AnyModel = TypeVar("AnyModel", Model, AutoregressiveModel, default=Model)


@dataclass(frozen=True)
class Bundle(Generic[AnyBundleConfig, AnyModel]):
    """Loaded model, for inference only.

    Attributes:
        config: Configuration, including a denoiser's noise schedule.
        model: Network and text encoder.
        tokenizer: Image tokenizer.

    Raises:
        UserError: Tokenizer and model have different numbers of codes.
    """

    config: AnyBundleConfig
    model: AnyModel
    tokenizer: ImageTokenizer

    def __post_init__(self) -> None:
        if self.tokenizer.codes != self.config.codebook_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.codes} codes, but the model has "
                f"{self.config.codebook_size}; they do not belong together (a reduction map may be missing)."
            )
        for module in (self.model, self.tokenizer):
            module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.model.network.code_embeddings[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network."""
        return self.model.dtype

    def to(self, target: torch.dtype | torch.device | str) -> None:
        """Move all modules to a device, or set the compute dtype of network and tokenizer.

        The text encoder, run once per prompt, and the tokenizer's selection of codes keep their dtype.
        """
        if isinstance(target, torch.dtype):
            cast(nn.Module, self.model.network).to(dtype=target)
            self.tokenizer.compute_in(target)
        else:
            self.model.to(device=target)
            self.tokenizer.to(device=target)


AutoregressiveBundle: TypeAlias = Bundle[AutoregressiveBundleConfig, AutoregressiveModel]


def save_bundle(
    folder: Path,
    config: BundleConfig | AutoregressiveBundleConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Path | tuple[TokenizerConfig, Mapping[str, Tensor]],
    purpose: str = "save_bundle",
) -> None:
    """Write a model bundle, including its tokenizer's, atomically.

    Args:
        folder: Output folder; a bundle of the same purpose is replaced.
        config: Configuration of the model.
        weights: State dictionary of the model.
        tokenizer: Tokenizer bundle to copy, or the tokenizer's configuration and state dictionary.
        purpose: Name of the writing tool.

    Raises:
        UserError: See `published_folder`.
    """
    if isinstance(config.text, Pretrained):
        config = config.model_copy(update={"text": config.text.without_weights()})
    with published_folder(folder, purpose) as partial:
        schedule = {_SCHEDULE: _fingerprint(config.diffusion)} if isinstance(config, BundleConfig) else {}
        _save(partial, config, weights, schedule)
        (partial / _TOKENIZER).mkdir()
        if isinstance(tokenizer, Path):
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(tokenizer / name, partial / _TOKENIZER / name)
        else:
            _save(partial / _TOKENIZER, *tokenizer)
        card = render(
            "model_card.md.j2",
            config=config,
            network=config.denoiser if isinstance(config, BundleConfig) else config.network,
            parameters=sum(tensor.numel() for tensor in weights.values()),
            tokenizer=json.dumps(read_json(partial / _TOKENIZER / CONFIG, "tokenizer bundle")),
        )
        publish_text(partial / _CARD, card)


def load_bundle(folder: Path) -> Bundle:
    """Load a denoiser from its bundle or a finished run, in float32 on the CPU.

    Raises:
        UserError: There is no bundle, a file is missing, damaged or of another shape, or the schedule in the
            configuration differs from that in the weights.
    """
    folder = _export_folder(folder)
    config = _load_config(_MODELS, folder, "model bundle")
    if not isinstance(config, BundleConfig):
        raise UserError(
            f"{folder}: contains an autoregressive model, which has no noise schedule; load it with "
            f"vqd_scale.models.autoregressive_sampling.AutoregressiveTextToImage."
        )
    bundle = _load_model(folder, config, Model)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        saved_schedule = (file.metadata() or {}).get(_SCHEDULE)
    if saved_schedule != _fingerprint(config.diffusion):
        raise UserError(
            f"{folder}: config.json has the schedule {_fingerprint(config.diffusion)}, but the weights were "
            f"trained under {saved_schedule}; restore the original config.json."
        )
    return bundle


def is_autoregressive(folder: Path) -> bool:
    """Return True if a folder is, or a run's folder contains, an autoregressive model's bundle.

    Raises:
        UserError: The configuration cannot be read.
    """
    path = _export_folder(folder) / CONFIG
    tag = AutoregressiveBundleConfig.model_fields["kind"].default
    return path.exists() and read_json(path, "model bundle", JSON_OBJECT).get("kind") == tag


def load_autoregressive_bundle(folder: Path) -> AutoregressiveBundle:
    """Load an autoregressive model as `load_bundle` loads a denoiser."""
    folder = _export_folder(folder)
    config = _load_config(_MODELS, folder, "model bundle")
    if not isinstance(config, AutoregressiveBundleConfig):
        raise UserError(f"{folder}: contains a denoiser; load it with vqd_scale.TextToImage.")
    return _load_model(folder, config, AutoregressiveModel)


def save_tokenizer(
    folder: Path, config: TokenizerConfig, weights: Mapping[str, Tensor], purpose: str = "save_tokenizer"
) -> None:
    """Write a tokenizer bundle; ``purpose`` and errors as for `save_bundle`."""
    with published_folder(folder, purpose) as partial:
        _save(partial, config, weights)


def load_tokenizer(folder: Path, device: torch.device) -> ImageTokenizer:
    """Load a tokenizer bundle; errors as for `load_bundle`."""
    config: TokenizerConfig = _load_config(kinds_of(TokenizerConfig), folder, "tokenizer bundle")
    weights = _read_weights(folder, config.build)
    tokenizer = config.build()
    tokenizer.load_state_dict(weights)
    return tokenizer.to(device).eval().requires_grad_(False)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the SHA-256 (hex) of a tokenizer's weights; token shards contain it, and training checks it.

    Raises:
        UserError: The folder contains no tokenizer bundle.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: there is no tokenizer bundle here; train_tokenizer.py makes one.")
    return sha256_of(folder / WEIGHTS)


def weights_file(folder: Path) -> Path:
    """Return the path of the weights in a bundle or a finished run."""
    return _export_folder(folder) / WEIGHTS


def schedule_of(folder: Path) -> Schedule:
    """Load the noise schedule of a denoiser; arguments and errors as for `load_bundle`."""
    return _load_config(BundleConfig, _export_folder(folder), "model bundle").diffusion


def tokenizer_folder(folder: Path) -> Path:
    """Return the path of the tokenizer bundle in a model bundle or a finished run."""
    return _export_folder(folder) / _TOKENIZER


def _export_folder(folder: Path) -> Path:
    return folder / "export" if (folder / "export").is_dir() else folder


def _save(
    folder: Path, config: Config, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    publish_json(folder / CONFIG, config.model_dump(mode="json"))
    write_tensors(folder / WEIGHTS, weights, metadata)


def _load_config(
    kind: type[ConfigType] | tuple[type[ConfigType], ...], folder: Path, description: str
) -> ConfigType:
    return validated(kind, read_json(folder / CONFIG, description, JSON_OBJECT), str(folder / CONFIG))


def _load_model(
    folder: Path, config: AnyBundleConfig, build: Callable[[AnyBundleConfig], AnyModel]
) -> Bundle[AnyBundleConfig, AnyModel]:
    text = (
        config.text.model_copy(update={"pretrained": None}) if isinstance(config.text, Pretrained) else None
    )
    planned_config = config.model_copy(update={"text": text or config.text})
    weights = _read_weights(folder, lambda: build(planned_config))
    model = build(config)
    model.load_state_dict(weights)
    return Bundle(config, model, load_tokenizer(folder / _TOKENIZER, torch.device("cpu")))


def _read_weights(folder: Path, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Read weights and compare them with a module's before any memory is allocated for it."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: the weights are missing; export or copy the bundle again.")
    weights, planned = read_tensors(path), planned_weights(build, str(folder / CONFIG))
    differing = [
        name
        for name in sorted(weights.keys() | planned.keys())
        if name not in weights or name not in planned or difference_of(weights[name], planned[name])
    ]
    if differing:
        raise UserError(
            f"{path}: the weights do not fit their config.json or are damaged ({len(differing)} are missing, "
            f"unknown or of another shape, '{differing[0]}' for one)."
        )
    check_finite(weights, str(path))
    return weights


def planned_weights(build: Callable[[], nn.Module], source: str) -> dict[str, Tensor]:
    """Return a module's state dictionary of meta tensors: names and shapes without memory.

    Args:
        build: Constructor of the module.
        source: Origin of its configuration, for error messages.

    Raises:
        UserError: No module of these sizes can be built, or its parts do not fit each other.
    """
    try:
        with torch.device("meta"):
            return build().state_dict()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (RuntimeError, ValueError, AssertionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{source}: no network of these sizes can be built ({reason}).") from None


def _fingerprint(schedule: Schedule) -> str:
    """Serialize a schedule's constants for the weights' metadata."""
    return json.dumps(schedule.model_dump(mode="json"), sort_keys=True)
