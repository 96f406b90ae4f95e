"""Initialization of a run from a trained model; each rank reads only its own partition."""

import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import differences
from vqd_scale.training.partition import Partition, Piece


@torch.no_grad()
def load_initial_weights(
    path: Path, partition: Partition, prefix: str = "", init_missing: Sequence[str] = ()
) -> None:
    """Load a bundle's weights; each rank reads only the rows that overlap its pieces.

    Args:
        path: Safetensors file of full tensors.
        partition: Pieces of this rank, overwritten.
        prefix: Prefix of the module's parameter names, relative to the names in the file.
        init_missing: Names, without prefix, of weights that are not in the file; they are unchanged.

    Raises:
        UserError: The file cannot be read, or its tensors differ from the module's trainable parameters.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {f"{prefix}{key}": file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            untouched = {f"{prefix}{name}" for name in init_missing}
            _check(path, stored, partition, untouched)
            for piece in partition.pieces:
                if piece.length and piece.name not in untouched:
                    target = partition.view(partition.masters, piece)
                    target.copy_(_elements(stored[piece.name], piece))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the initial weights cannot be read ({error}).") from None
    partition.masters_changed()


def _check(path: Path, stored: dict[str, Any], partition: Partition, untouched: Set[str]) -> None:
    stored_shapes = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
    shapes = {piece.name: piece.shape for piece in partition.pieces if piece.name not in untouched}
    differing = sorted(differences(stored_shapes, shapes))
    if differing:
        listed = ", ".join(
            f"{name} ({stored_shape} in the file, {shape} in the run)"
            for name, stored_shape, shape in differing[:5]
        )
        raise UserError(
            f"{path}: {len(differing)} of its tensors differ from those that this run trains: {listed}; "
            "give the run the architecture of its config.json, and name additions in init_from.init_missing."
        )


def _elements(stored: Any, piece: Piece) -> Tensor:  # noqa: ANN401 - a slice of a file, untyped upstream
    """Read a piece's elements, loading only the overlapping rows of the stored tensor."""
    row = math.prod(piece.shape[1:])
    first, last = piece.start // row, -(-(piece.start + piece.length) // row)
    before = piece.start - first * row
    return stored[first:last].flatten()[before : before + piece.length]
