"""Named tensors in files: written, and read without running what is in somebody else's."""

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
    """The tensors of a safetensors file, or of what ``torch.save`` wrote: a mapping of them, or a single one.

    A mapping may lie under the key ``state_dict``. Entries that are no tensors are left out; the name of a
    single tensor is empty. See `vqd_scale.core.safe_load` for what is not run.

    Raises:
        UserError: The file is missing, damaged, a TorchScript program, or holds something else.
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
    """Write a safetensors file, readable for whom the umask lets read.

    Raises:
        UserError: The disk is full.
    """
    path.touch()
    # safetensors itself lets nobody but the writer read what it wrote.
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    except SafetensorError as error:
        raise UserError(f"{path}: the weights cannot be written ({error}); free some space.") from None
    path.chmod(mode)


def check_names(state: Mapping[str, Tensor], expected: Iterable[str], whose: str) -> None:
    """See that a state dictionary has the entries that it should have and no others.

    Raises:
        UserError: Entries are unknown or missing; all are listed.
    """
    known = set(expected)
    unknown, missing = sorted(state.keys() - known), sorted(known - state.keys())
    if unknown or missing:
        raise UserError(
            f"these are not the weights of {whose}: unknown {', '.join(unknown) or 'none'}; missing "
            f"{', '.join(missing) or 'none'}."
        )


def _is_program(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
