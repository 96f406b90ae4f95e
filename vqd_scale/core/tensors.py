"""Reading and writing of files of named tensors, without executing code in them."""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_load import read_saved


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file or of a ``torch.save`` file (a mapping or a single tensor).

    A mapping may be nested under the key ``state_dict``. Other entries than tensors are dropped. A single
    tensor gets the empty name. `vqd_scale.core.safe_load` reads ``torch.save`` files without executing code.

    Raises:
        UserError: The file is missing, damaged, a TorchScript program, or contains no tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: is damaged or no safetensors file ({_line(error)}).") from None
    if _is_program(path):
        raise UserError(
            f"{path}: is a TorchScript program, not a file of weights; where you trust it, convert it by "
            f"safetensors.torch.save_file(torch.jit.load(path).state_dict(), 'weights.safetensors')."
        )
    loaded = read_saved(path)
    if isinstance(loaded, Tensor):
        return {"": loaded}
    entries = cast(dict[Any, Any], loaded) if isinstance(loaded, dict) else {}
    entries = entries.get("state_dict", entries)
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors.")
    return tensors


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
            f"these are not the weights of {whose}: unknown {', '.join(unknown) or 'none'}; missing "
            f"{', '.join(missing) or 'none'}."
        )


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add a prefix to every name."""
    return {prefix + name: value for name, value in state.items()}


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _is_program(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
