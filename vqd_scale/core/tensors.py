"""Reading and writing of files of named tensors, without executing code in them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_load import read_saved, tensors_in


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file or of a ``torch.save`` file (a mapping or a single tensor).

    A mapping may be nested under the key ``state_dict``; see `vqd_scale.core.safe_load.tensors_in` for its
    names. A single tensor gets the empty name. No code in the file is executed.

    Raises:
        UserError: The file is missing, damaged, a TorchScript program, or contains no tensors.
    """
    loaded = read_saved(path)
    if isinstance(loaded, Tensor):
        return {"": loaded}
    entries = cast(dict[Any, Any], loaded) if isinstance(loaded, dict) else {}
    tensors = tensors_in(entries.get("state_dict", entries))
    if not tensors:
        raise UserError(f"{path}: holds no tensors.")
    return tensors


def difference_of(tensor: Tensor, expected: Tensor) -> str:
    """Describe how a weight differs from the expected shape and kind of number; empty if it does not."""
    if tensor.shape != expected.shape:
        return f"shape {list(tensor.shape)}, not {list(expected.shape)}"
    is_alike = tensor.is_floating_point() == expected.is_floating_point()
    return "" if is_alike else f"type {tensor.dtype}, not {expected.dtype}"


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a `UserError` if a weight is NaN or infinite; one pass over the memory, without a copy."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise UserError(
                f"{source}: the weight '{name}' has NaN or infinite values; take another checkpoint."
            )


def _is_finite(tensor: Tensor) -> bool:
    # aminmax propagates NaN; it does not exist for float8.
    extremes = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return all(bool(extreme.isfinite()) for extreme in extremes)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of the umask.

    Raises:
        UserError: The disk is full.
    """
    path.touch()
    # safetensors creates files that only the owner can read.
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    except SafetensorError as error:
        raise UserError(f"{path}: the weights cannot be written ({error}); free some space.") from None
    path.chmod(mode)


def check_names(state: Mapping[str, Tensor], expected: Iterable[str], whose: str) -> None:
    """Raise a `UserError` that lists the unknown and the missing entries of a state dictionary, if any."""
    expected_names = set(expected)
    unknown, missing = sorted(state.keys() - expected_names), sorted(expected_names - state.keys())
    if unknown or missing:
        raise UserError(
            f"these are not the weights of {whose}: unknown {_listed(unknown)}; missing {_listed(missing)}."
        )


def _listed(names: list[str]) -> str:
    # A training checkpoint has thousands of other names.
    return ", ".join([*names[:3], *([f"and {len(names) - 3} more"] if len(names) > 3 else [])]) or "none"


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add a prefix to every name."""
    return {prefix + name: value for name, value in state.items()}


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
