"""Fingerprints of what a result depends on, and the first difference of two descriptions of it.

A result is stored with a description of all its inputs as JSON values: configurations, digests of weights and
data, versions of a meaning. A result with another description is refused or computed again, never reused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import differences
from vqd_scale.core.tensors import read_tensors, write_tensors

_DIGEST = "sha256"


def json_digest(value: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    """Return the hex SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of named tensors: names, dtypes, shapes and all bytes.

    The tensors are hashed, not their files: so every layout that a model can be loaded from is covered, and a
    file that is replaced after it was read changes nothing.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def configs_digest(module: nn.Module) -> str:
    """Return the hex SHA-256 of the configurations that the parts of a network carry."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    return json_digest([config.model_dump(mode="json") for config in configs if isinstance(config, Config)])


def write_with_digest(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a digest of its content; errors as for `write_tensors`."""
    write_tensors(path, tensors, {**metadata, _DIGEST: tensors_digest(tensors)})


def read_with_digest(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a file of `write_with_digest`.

    Raises:
        UserError: The file is missing, damaged, or has no digest.
    """
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    if metadata.get(_DIGEST) != tensors_digest(tensors):
        raise UserError(f"{path}: damaged, or written by another version; delete it and start again.")
    return tensors, metadata


def first_difference(stored: Any, expected: Any) -> str | None:  # noqa: ANN401 - JSON values
    """Return the first difference of two JSON values as 'a.b this, not that'; ``None`` if equal."""
    for path, value, expected_value in differences(stored, json.loads(json.dumps(expected))):
        return f"{path} {_short(value)}, not {_short(expected_value)}"
    return None


def _short(value: Any) -> str:  # noqa: ANN401 - JSON
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
