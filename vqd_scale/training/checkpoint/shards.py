"""Named slices: what one rank holds of every weight, moment and average, in one safetensors file.

A slice is flat and named ``{kind}/{parameter}/{start}``. Reading copies the overlap of whatever slices there
are with whatever pieces are asked for, so any number of ranks reads what any other number wrote.
"""

import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vqd_scale.core.atomic_io import sync_to_disk, writing
from vqd_scale.core.errors import UserError
from vqd_scale.training.partition import Partition, Piece

if sys.platform == "linux":
    import fcntl

_PAGE = 4096
"""What lies at multiples of so many bytes, in memory and in the file, can go to any disk without a copy."""
_BLOCK = 1 << 24
_LENGTH = 8
"""A file of safetensors begins with the length of its header, in so many bytes."""
_ALIGNMENT = 8
_LAST_IN_LINE = 19
_ELEMENT = 4


class HostSlices:
    """A rank's slices in the host's memory, as they lie in the file, its header before them.

    The buffer is made once and kept: filling it is all that training waits for while a checkpoint is written.

    Args:
        partition: Says which pieces there are.
        kinds: What there is of each piece: its weights, moments, average.
    """

    def __init__(self, partition: Partition, kinds: Iterable[str]) -> None:
        self._partition = partition
        self._places = [(kind, piece) for kind in kinds for piece in partition.pieces if piece.length]
        header: dict[str, Any] = {}
        begin = 0
        for kind, piece in self._places:
            end = begin + piece.length
            offsets = [begin * _ELEMENT, end * _ELEMENT]
            header[f"{kind}/{piece.name}/{piece.start}"] = {
                "dtype": "F32",
                "shape": [piece.length],
                "data_offsets": offsets,
            }
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-(_LENGTH + len(text)) % _ALIGNMENT)
        text = len(text).to_bytes(_LENGTH, "little") + text
        self._image = _at_a_page(len(text) + begin * _ELEMENT)
        self._image[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._numbers = self._image[len(text) :].view(torch.float32)

    @torch.no_grad()
    def fill(self, flats: Mapping[str, list[Tensor]]) -> None:
        """Copy the slices as they are now.

        Args:
            flats: The flat float32 tensors of each kind, one a group.
        """
        begin = 0
        for kind, piece in self._places:
            source = self._partition.view(flats[kind], piece)
            self._numbers[begin : begin + piece.length].copy_(source, non_blocking=True)
            begin += piece.length
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, path: Path) -> dict[str, Any]:
        """Write what was copied, down to the disk.

        Returns:
            The file's name, size and SHA-256, for a manifest.

        Raises:
            UserError: The file cannot be written; nothing of it is left.
        """
        return write_described(path, self._image.numpy().data, at_a_page=True)


def _at_a_page(size: int) -> Tensor:
    """So many bytes of memory that begin with a page; in a GPU's reach, if there is one."""
    room = torch.empty(size + _PAGE, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    begin = -room.data_ptr() % _PAGE
    return room[begin : begin + size]


def write_described(path: Path, content: bytes | memoryview, *, at_a_page: bool = False) -> dict[str, Any]:
    """Write a file, down to the disk.

    Args:
        path: The file.
        content: What it is to hold.
        at_a_page: Whether that begins with a page of memory. It then goes past the system's cache where the
            file system lets it: a copy there costs as much of a core as the training beside it can spare, and
            pushes out what will be read again, as a checkpoint will not.

    Returns:
        The file's name, size and SHA-256, for a manifest.

    Raises:
        UserError: It cannot be written; nothing of it is left.
    """
    content = memoryview(content)
    digest = hashlib.sha256()
    whole_pages = len(content) // _PAGE * _PAGE if at_a_page else 0
    with writing(path):
        try:
            with path.open("wb", buffering=0) as file:
                _past_the_cache(file, at_a_page)
                for piece in _written(file, content[:whole_pages]):
                    digest.update(piece)
                _past_the_cache(file, False)
                for piece in _written(file, content[whole_pages:]):
                    digest.update(piece)
            sync_to_disk(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return {"name": path.name, "bytes": len(content), "sha256": digest.hexdigest()}


def _written(file: FileIO, content: memoryview) -> Iterator[memoryview]:
    """The content again, in pieces that have been written."""
    while content:
        try:
            # A disk that is nearly full takes less than it is given.
            count = file.write(content[:_BLOCK])
        except OSError as refused:
            if refused.errno == errno.EINVAL and _past_the_cache(file, False):
                continue
            raise
        yield content[:count]
        content = content[count:]


def _past_the_cache(file: FileIO, whether: bool) -> bool:
    """Let what is written next go past the system's cache, or not; says whether that is a change.

    Where system or file system cannot, it goes through the cache: nothing but its speed is different.
    """
    if sys.platform != "linux":
        return False
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if whether else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, wanted)
    except OSError as refused:
        if refused.errno != errno.EINVAL:
            raise
        return False
    return wanted != flags


def give_way() -> None:
    """Let this thread run only where no other wants to: what it writes has time, and training has none.

    On Linux, where threads have priorities of their own; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST_IN_LINE)


class StoredSlices:
    """All slices of some files, by what they are slices of.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, list[tuple[int, Path, str]]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    name, _, start = key.rpartition("/")
                    self._places.setdefault(name, []).append((int(start), path, key))

    def copy(self, kind: str, piece: Piece, target: Tensor) -> None:
        """Fill a piece's elements from every slice that overlaps it.

        Raises:
            UserError: Some of its elements are in no slice.
        """
        filled = 0
        begin, end = piece.start, piece.start + piece.length
        for start, values in self._overlapping(f"{kind}/{piece.name}", begin, end):
            target[start - begin : start - begin + len(values)].copy_(values)
            filled += len(values)
        if filled != piece.length:
            raise UserError(
                f"{piece.name}: the checkpoint holds {filled} of {piece.length} elements of its {kind}."
            )

    def _overlapping(self, name: str, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        for start, path, key in self._places.get(name, []):
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(key)
                length = stored.get_shape()[0]
                first, last = max(begin, start), min(end, start + length)
                if first < last:
                    yield first, stored[first - start : last - start]
