"""Published CLIP text towers: shapes by open_clip model name, weights by open_clip tag or from a file."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import read_tensors, without_prefix
from vqd_scale.text.weights import PREFIX, from_transformers

_ALIAS = "vqd_scale_open_clip"
_SHAPE = ("context_length", "vocab_size", "width", "heads", "layers")
"""open_clip's names of the fields of `Shape`, in their order."""
_FILES = {".safetensors", ".pt", ".pth", ".bin"}
_TRANSFORMERS_KEY = "embeddings.token_embedding.weight"
"""Key that identifies files of transformers, with or without the prefix."""
_TORCHSCRIPT_KEYS = {"input_resolution", "context_length", "vocab_size"}
"""Keys that a conversion of OpenAI's TorchScript programs leaves among the weights."""


class _Activation(TypedDict, total=False):
    hidden_act: str


class _ActivationConfig(_Activation, total=False):
    text_config: _Activation | None


_ACTIVATION = TypeAdapter(_ActivationConfig)


class _UnusedModule(ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@functools.cache
def open_clip_module(name: str) -> Any:  # noqa: ANN401 - a module has no static type
    """Import one module of open_clip without the others.

    open_clip's ``__init__`` imports timm, transformers and all of torchvision, which takes seconds; the text
    tower and its tokenizer need torch only. The module is loaded under another package name, so that a
    regular import of open_clip remains complete.
    """
    if _ALIAS not in sys.modules:
        package, spec = ModuleType(_ALIAS), importlib.util.find_spec("open_clip")
        package.__path__ = [] if spec is None else list(spec.submodule_search_locations or [])
        # `transformer` imports helpers of its vision towers from `utils`, which imports torchvision.
        utils = _UnusedModule(f"{_ALIAS}.utils")
        sys.modules |= {_ALIAS: package, utils.__name__: utils}
    return importlib.import_module(f"{_ALIAS}.{name}")


class Shape(NamedTuple):
    """Shape of a text tower.

    Attributes:
        context_length: Positions per caption.
        vocabulary: Number of token ids.
        width: Number of channels.
        heads: Attention heads per layer.
        layers: Number of layers.
        quick_gelu: True if trained with x * sigmoid(1.702 x) instead of GELU.
    """

    context_length: int
    vocabulary: int
    width: int
    heads: int
    layers: int
    quick_gelu: bool


def published_shape(model: str) -> Shape:
    """Return the shape of an open_clip model's text tower.

    Raises:
        UserError: The model does not exist, or its text tower is not CLIP's.
    """
    import open_clip

    # Others of open_clip's names, such as hf-hub:OWNER/NAME, are addresses, which it would open.
    config = None if ":" in model else open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"text.model: open_clip knows no model '{model}'; see open_clip.list_models().")
    text = config["text_cfg"]
    differing = sorted(text.keys() ^ _SHAPE)
    if differing:
        raise UserError(
            f"text.model: the text tower of '{model}' is not CLIP's (it differs in {', '.join(differing)}); "
            f"take one such as 'ViT-B-32-quickgelu' or 'ViT-L-14'."
        )
    return Shape(*(text[key] for key in _SHAPE), quick_gelu=bool(config.get("quick_gelu", False)))


def published_weights(model: str, pretrained: str) -> dict[str, Tensor]:
    """Load the weights of a text tower with open_clip's keys; the result may contain other keys.

    Args:
        model: Name of an open_clip model.
        pretrained: open_clip tag of the model, or a weight file with OpenAI's, open_clip's or transformers'
            keys.

    Raises:
        UserError: The tag or file does not exist, the weights cannot be loaded, or the weights were trained
            with another activation than the model's.
    """
    if Path(pretrained).suffix in _FILES or Path(pretrained).is_file():
        return _from_file(model, Path(pretrained))
    return _from_tag(model, pretrained)


def _from_tag(model: str, tag: str) -> dict[str, Tensor]:
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    config = get_pretrained_cfg(model, tag)
    if not config:
        tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise UserError(
            f"text.pretrained: '{model}' has no weights '{tag}'; give one of its tags ({tags}) or a file."
        )
    check_activation(model, bool(config.get("quick_gelu", False)), f"the weights '{tag}'")
    try:
        file = download_pretrained(config)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"text.pretrained: the weights '{tag}' of '{model}' cannot be loaded ({reason}); give a local "
            f"file."
        ) from None
    return _to_open_clip_keys(read_tensors(Path(file)))


def _from_file(model: str, file: Path) -> dict[str, Tensor]:
    state = read_tensors(file)
    if state.keys() >= _TORCHSCRIPT_KEYS:
        check_activation(model, True, f"OpenAI's weights in {file}")
    config_file = file.with_name("config.json")
    if _is_transformers(state) and config_file.is_file():
        config = read_json(config_file, "configuration of these weights", _ACTIVATION)
        activation = (config.get("text_config") or config).get("hidden_act", "quick_gelu")
        check_activation(model, activation == "quick_gelu", f"the weights in {file}")
    return _to_open_clip_keys(state)


def check_activation(model: str, quick_gelu: bool, weights: str, key: str = "text.model") -> None:
    """Check that weights and model have the same activation; a mismatch silently changes the features.

    Args:
        model: Name of an open_clip model.
        quick_gelu: True if the weights were trained with QuickGELU.
        weights: Name of the weights, for the error message.
        key: Configuration key of the model, for the error message.

    Raises:
        UserError: They have not.
    """
    import open_clip

    if bool((open_clip.get_model_config(model) or {}).get("quick_gelu")) == quick_gelu:
        return
    alternative = f"{model}-quickgelu" if quick_gelu else model.removesuffix("-quickgelu")
    trained, has = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
    raise UserError(
        f"{key}: {weights} were trained with {trained}, but '{model}' has {has}; take '{alternative}'."
    )


def _to_open_clip_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert keys to open_clip's text tower: strip the prefixes of whole models, keep other keys."""
    if _is_transformers(state):
        return from_transformers(without_prefix(state, PREFIX) or state)
    return {name.removeprefix("text."): value for name, value in state.items()}


def _is_transformers(state: Mapping[str, Tensor]) -> bool:
    return _TRANSFORMERS_KEY in state or PREFIX + _TRANSFORMERS_KEY in state
