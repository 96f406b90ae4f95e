"""Key mapping of CLIP's text tower: pure functions between state dictionaries.

This project uses the keys of OpenAI and open_clip. transformers' ``CLIPTextModel`` is the same network with
other keys, and with separate matrices for queries, keys and values.
"""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from vqd_scale.core.tensors import check_names

PREFIX = "text_model."
"""Prefix of all keys in transformers' files; the modules of newer versions have no prefix."""

_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_KINDS = ("weight", "bias")
_POSITIONS = "embeddings.position_ids"
"""Key of the position ids 0, 1, 2, ..., which earlier versions of transformers saved."""


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a text tower's state to the keys of ``CLIPTextModel`` files.

    Raises:
        UserError: Keys are unknown or missing; the message lists all of them.
    """
    layers = _layers(state, "transformer.resblocks.")
    keys, joint_keys = _keys(layers), _joint_keys(layers)
    check_names(state, [*keys, *joint_keys], "CLIP's text tower")
    converted = {PREFIX + target: state[key] for key, target in keys.items()}
    for key, targets in joint_keys.items():
        for target, part in zip(targets, state[key].chunk(3), strict=True):
            converted[PREFIX + target] = part.contiguous()
    return converted


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a ``CLIPTextModel``, with or without prefix, to a text tower's keys.

    Raises:
        UserError: Keys are unknown or missing; the message lists all of them.
    """
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    state.pop(_POSITIONS, None)
    layers = _layers(state, "encoder.layers.")
    keys, joint_keys = _keys(layers), _joint_keys(layers)
    expected = [*keys.values(), *chain.from_iterable(joint_keys.values())]
    check_names(state, expected, "transformers' CLIPTextModel")
    converted = {key: state[source] for key, source in keys.items()}
    for key, sources in joint_keys.items():
        converted[key] = torch.cat([state[source] for source in sources])
    return converted


def _keys(layers: int) -> dict[str, str]:
    return _OUTER | {
        f"transformer.resblocks.{layer}.{key}.{kind}": f"encoder.layers.{layer}.{transformers_key}.{kind}"
        for layer in range(layers)
        for key, transformers_key in _LAYER.items()
        for kind in _KINDS
    }


def _joint_keys(layers: int) -> dict[str, list[str]]:
    """Return the keys of the matrices of queries, keys and values, by the key of the joint matrix."""
    return {
        f"transformer.resblocks.{layer}.attn.in_proj_{kind}": [
            f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"
        ]
        for layer in range(layers)
        for kind in _KINDS
    }


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
