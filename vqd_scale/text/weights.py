"""Key mapping of CLIP's text tower: pure functions between state dictionaries.

This project uses the keys of OpenAI and open_clip. transformers' ``CLIPTextModel`` is the same network with
other keys, and with separate matrices for queries, keys and values.
"""

from collections.abc import Mapping

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
    names = _names(layers)
    joined = [(_joined(layer, kind), _split(layer, kind)) for layer in range(layers) for kind in _KINDS]
    check_names(state, [*names, *(ours for ours, _ in joined)], "CLIP's text tower")
    theirs = {PREFIX + their: state[ours] for ours, their in names.items()}
    for ours, split in joined:
        parts = zip(split, state[ours].chunk(3), strict=True)
        theirs |= {PREFIX + their: part.contiguous() for their, part in parts}
    return theirs


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a ``CLIPTextModel``, with or without prefix, to a text tower's keys.

    Raises:
        UserError: Keys are unknown or missing; the message lists all of them.
    """
    given = {name.removeprefix(PREFIX): value for name, value in state.items()}
    given.pop(_POSITIONS, None)
    layers = _layers(given, "encoder.layers.")
    names = _names(layers)
    joined = [(_joined(layer, kind), _split(layer, kind)) for layer in range(layers) for kind in _KINDS]
    check_names(
        given,
        [*names.values(), *(their for _, split in joined for their in split)],
        "transformers' CLIPTextModel",
    )
    ours = {name: given[their] for name, their in names.items()}
    return ours | {name: torch.cat([given[their] for their in split]) for name, split in joined}


def _names(layers: int) -> dict[str, str]:
    return _OUTER | {
        f"transformer.resblocks.{layer}.{ours}.{kind}": f"encoder.layers.{layer}.{theirs}.{kind}"
        for layer in range(layers)
        for ours, theirs in _LAYER.items()
        for kind in _KINDS
    }


def _joined(layer: int, kind: str) -> str:
    return f"transformer.resblocks.{layer}.attn.in_proj_{kind}"


def _split(layer: int, kind: str) -> list[str]:
    return [f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
