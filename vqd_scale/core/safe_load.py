"""Safe loading of third-party checkpoints, without executing code in them.

A ``.pth`` or ``.ckpt`` file is a pickle, which can name and call any function. torch's ``weights_only``
reader calls only functions that build tensors. Old taming checkpoints also contain settings and callbacks of
omegaconf and Lightning; these objects are replaced by inert placeholders. The names in a file, and the sizes
that it claims, are checked before torch reads it.
"""

import codecs
import io
import mmap
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar

_TENSORS = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|complex)|_codecs\.encode"
    r"|torch\._utils\._rebuild_(tensor(_v2)?|parameter(_with_state)?)|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.((cuda\.)?[A-Z]\w*Storage|Size|Tensor|device|bool|bfloat16|[a-z]+\d\w*|nn\.parameter\.Parameter)"
)
"""Names of which tensors consist. torch's reader also allows ``bytearray`` and others that allocate any size
given in the file; these are refused."""

_INERT = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|lightning_fabric|numpy|typing|enum|pathlib|argparse)\..+"
    r"|builtins\.(dict|list|tuple|int|float|str|bool|object|slice)"
)
"""Names allowed beside tensors and replaced by placeholders, never called: settings, callbacks, scalars."""

_INERT_MAPPINGS = re.compile(r"collections\.defaultdict|.+\.AttributeDict")
"""Names of mapping types, replaced by a dictionary because torch's reader inserts entries."""

_WRAPPERS = ("module.", "_orig_mod.")
_EMA = "model_ema."
_EMA_COUNTERS = ("decay", "num_updates")
_BLOCK = 1 << 24
_PICKLE = b"\x80"
_LFS = b"version https://git-lfs"
_LEGACY_PICKLES = 4
"""Pickles before the weights in a file of torch < 1.6: a number, a version, the system, and the content."""
_SHARED = 4
"""Largest accepted ratio of the bytes of all tensors, which may share memory, to those of their file."""


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
    """Load a ``torch.save`` or safetensors file; tensors of zip archives are memory-mapped.

    Raises:
        UserError: The file is missing, damaged, a TorchScript program, or names more than tensors and inert
            settings.
    """
    head = _head(path)
    try:
        # torch's warnings and errors advise trusting the file; that advice must not reach the user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_file(path) if head[8:9] == b"{" else _load(path)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file can make its reader raise anything
        raise UserError(
            f"{path}: is damaged or no file of weights; nothing in it was executed ({_reason(error)})."
        ) from None
    # A tensor can claim any size over a small storage; copying it would allocate that size.
    size = sum(tensor.nbytes for tensor in _all_tensors(loaded))
    if size > _SHARED * path.stat().st_size + _BLOCK:
        raise UserError(f"{path}: claims {size:,} bytes of tensors, more than the file can contain.")
    return loaded


def tensors_in(value: object) -> dict[str, Tensor]:
    """Return the named tensors of a state dictionary, without its other entries.

    The prefixes of wrapped modules (``module.``, ``_orig_mod.``) are removed. Averaged weights
    (``model_ema.*``, also without the dots of the names, as LitEma writes them) replace the others.
    """
    entries = cast(dict[Any, Any], value).items() if isinstance(value, dict) else ()
    state = {str(name): entry.detach() for name, entry in entries if isinstance(entry, Tensor)}
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    averages = {name.removeprefix(_EMA): state.pop(name) for name in list(state) if name.startswith(_EMA)}
    for name in _EMA_COUNTERS:
        averages.pop(name, None)
    if not state:
        return averages
    return {name: averages.get(name, averages.get(name.replace(".", ""), state[name])) for name in state}


def _all_tensors(value: object) -> Iterator[Tensor]:
    """Yield each tensor in nested dictionaries, lists and tuples once."""
    pending, visited = [value], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            pending.extend(cast(dict[Any, object], value).values())
        elif isinstance(value, list | tuple):
            pending.extend(cast(list[object], value))


def _head(path: Path) -> bytes:
    """Return the first bytes of a file; a `UserError` if they are text, as of a failed download."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if head.startswith(_LFS):
        raise UserError(
            f"{path}: is a pointer of git-lfs, not the weights themselves; fetch these with 'git lfs pull'."
        )
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"<":
        raise UserError(f"{path}: is a web page (HTML or XML), not a file of weights; download it again.")
    if head and head.isascii() and b"\0" not in head and head[:1] != _PICKLE:
        raise UserError(
            f"{path}: is damaged or no file of weights: its content is the text {head[:60].decode()!r}; "
            f"download it again."
        )
    return head


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's last message line that does not mention its documentation."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "documentation" not in line]
    sentence = lines[-1].removeprefix("WeightsUnpickler error: ").partition(". ")[0] if lines else ""
    return sentence[:150] or type(error).__name__


def _load(path: Path) -> object:
    is_archive = zipfile.is_zipfile(path)
    names = _names_in_archive(path) if is_archive else _names_in_legacy_file(path)
    mappings = [name for name in names if _INERT_MAPPINGS.fullmatch(name)]
    inert = [name for name in names if name not in mappings and _INERT.fullmatch(name)]
    allowed = {*mappings, *inert, *filter(_TENSORS.fullmatch, names)}
    if suspect := sorted(names - allowed):
        raise UserError(
            f"{path}: would call {', '.join(suspect)} on loading, which no weights need; nothing in it was "
            "executed, get the file from its publisher again."
        )
    placeholders: list[Any] = [(_InertMapping, name) for name in mappings]
    placeholders += [(_Inert, name) for name in inert]
    with torch.serialization.safe_globals(placeholders):
        return torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)


def _names_in_archive(path: Path) -> set[str]:
    """Return the names in an archive's pickles; check its sizes and checksums, which torch ignores."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive, progress_bar("check", size, unit="B") as bar:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise UserError(
                f"{path}: is a TorchScript program, not a file of weights; where you trust it, convert it by "
                f"safetensors.torch.save_file(torch.jit.load(path).state_dict(), 'weights.safetensors')."
            )
        # torch.save never compresses, so more content than file is a decompression bomb.
        if (claimed := sum(member.file_size for member in members)) > size:
            raise UserError(f"{path}: claims {claimed:,} bytes of content, more than the file can contain.")
        for member in members:
            with archive.open(member) as file:
                while block := file.read(_BLOCK):
                    bar.update(len(block))
        pickles = [archive.read(member) for member in members if member.filename.endswith("data.pkl")]
    return set[str]().union(*(_names_in(io.BytesIO(content)) for content in pickles))


def _names_in_legacy_file(path: Path) -> set[str]:
    # A memory map answers a read of any length with what is left of the file.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return set[str]().union(*(_names_in(cast(IO[bytes], content)) for _ in range(_LEGACY_PICKLES)))


def _names_in(stream: IO[bytes]) -> set[str]:
    """Return the names that a pickle would import, as in Python 3."""
    names: set[str] = set()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError("its pickle has another protocol than torch.save's, 2")
    return names
