"""Safe loading of third-party checkpoints, without executing code in them.

A ``.pth`` or ``.ckpt`` file is a pickle, which can name and call any function. torch's ``weights_only``
reader calls only functions that build tensors. Old taming checkpoints also contain settings and callbacks of
omegaconf and Lightning; these objects are replaced by inert placeholders.
"""

import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar

_INERT = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|lightning_fabric|numpy|typing|enum|pathlib|argparse)\..+"
    r"|builtins\.(dict|list|tuple|int|float|str|bool|object|slice)"
)
"""Names allowed beside tensors and replaced by placeholders, never called: settings, callbacks, scalars."""

_INERT_MAPPINGS = re.compile(r"collections\.defaultdict|.+\.AttributeDict")
"""Names of mapping types, replaced by a dictionary because torch's reader inserts entries."""

_BLOCK = 1 << 24


class _Inert:
    """Inert placeholder that accepts any arguments and state and stores nothing."""

    def __new__(cls, *arguments: object) -> "_Inert":
        del arguments
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        del state


class _InertMapping:
    """Placeholder that creates an `OrderedDict`: torch's reader fills only the classes that it allows."""

    def __new__(cls, *arguments: object) -> "OrderedDict[Any, Any]":
        del arguments
        return OrderedDict()


def read_saved(path: Path) -> object:
    """Load a ``torch.save`` file; tensors of zip archives are memory-mapped.

    Raises:
        UserError: The file is missing, damaged, or names more than tensors and inert settings.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights.")
    try:
        # torch's warnings and errors advise trusting the file; that advice must not reach the user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _load(path)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can make its reader raise anything
        raise UserError(
            f"{path}: is damaged or no file of weights; nothing in it was executed ({_reason(error)})."
        ) from None


def tensors_in(value: object) -> dict[str, Tensor]:
    """Return the named tensors of a state dictionary, without its other entries."""
    entries = cast(dict[Any, Any], value).items() if isinstance(value, dict) else ()
    return {str(name): entry.detach() for name, entry in entries if isinstance(entry, Tensor)}


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's last message line that does not mention its documentation."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "documentation" not in line]
    sentence = lines[-1].removeprefix("WeightsUnpickler error: ").partition(". ")[0] if lines else ""
    return sentence[:150] or type(error).__name__


def _load(path: Path) -> object:
    archive = zipfile.is_zipfile(path)
    named: list[str] = []
    if archive:
        _check_sums(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    mappings = [name for name in named if _INERT_MAPPINGS.fullmatch(name)]
    inert = [name for name in named if name not in mappings and _INERT.fullmatch(name)]
    if suspect := sorted({*named} - {*mappings, *inert}):
        raise UserError(
            f"{path}: would call {', '.join(suspect)} on loading, which no weights need; nothing in it was "
            "executed, get the file from its publisher again."
        )
    placeholders: list[Any] = [(_InertMapping, name) for name in mappings]
    placeholders += [(_Inert, name) for name in inert]
    with torch.serialization.safe_globals(placeholders):
        return torch.load(path, map_location="cpu", mmap=archive, weights_only=True)


def _check_sums(path: Path) -> None:
    """Verify the checksums of the whole archive, which torch's reader ignores."""
    with zipfile.ZipFile(path) as archive, progress_bar("check", path.stat().st_size, unit="B") as bar:
        for member in archive.infolist():
            with archive.open(member) as file:
                while block := file.read(_BLOCK):
                    bar.update(len(block))
