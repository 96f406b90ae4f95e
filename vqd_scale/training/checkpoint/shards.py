"""Checkpoint shards: one safetensors file per rank with its slices of weights, moments and EMA.

A slice is a flat float32 tensor named ``{kind}/{parameter}/{start}``. Loading copies the overlap of each
stored slice with each requested piece, so a checkpoint can be loaded by any number of ranks.

Example: a parameter ``w`` of 10 elements, saved by 2 ranks and loaded by 3 ranks under ZeRO-3::

    saved by rank 0   master/w/0   elements 0 to 4
    saved by rank 1   master/w/5   elements 5 to 9
    loaded by rank 0  elements 0 to 3   from master/w/0
    loaded by rank 1  elements 4 to 7   4 from master/w/0, 5 to 7 from master/w/5
    loaded by rank 2  elements 8 to 9   from master/w/5
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
from vqd_scale.core.watchdog import beat
from vqd_scale.training.partition import Partition, Piece

if sys.platform == "linux":
    import fcntl

_PAGE = 4096
"""Alignment of memory and file offset in bytes for direct I/O (``O_DIRECT``) on any disk."""
_BLOCK = 1 << 24
_LENGTH = 8
"""Bytes of the length field at the start of a safetensors file."""
_ALIGNMENT = 8
_LOWEST_PRIORITY = 19
_ELEMENT = 4


class HostSlices:
    """Contents of a rank's shard file in host memory, header and slices.

    The buffer is allocated once and reused. In an asynchronous save, training waits only for the copy into
    this buffer.

    Args:
        partition: Pieces of this rank.
        kinds: Kinds of tensors saved for each piece: master weights, moments, EMA.
    """

    def __init__(self, partition: Partition, kinds: Iterable[str]) -> None:
        self._partition = partition
        self._slices = [(kind, piece) for kind in kinds for piece in partition.pieces if piece.length]
        header: dict[str, Any] = {}
        begin = 0
        for kind, piece in self._slices:
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
        self._buffer = _page_aligned(len(text) + begin * _ELEMENT)
        self._buffer[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._values = self._buffer[len(text) :].view(torch.float32)

    @torch.no_grad()
    def fill(self, flats: Mapping[str, list[Tensor]]) -> None:
        """Copy the current slices into the buffer.

        Args:
            flats: Flat float32 tensors of each kind, one per group.
        """
        begin = 0
        for kind, piece in self._slices:
            source = self._partition.view(flats[kind], piece)
            self._values[begin : begin + piece.length].copy_(source, non_blocking=True)
            begin += piece.length
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, path: Path) -> dict[str, Any]:
        """Write the buffer to a file and sync it to disk.

        Returns:
            Name, size and SHA-256 of the file, for the manifest.

        Raises:
            UserError: The file cannot be written; the partial file is deleted.
        """
        return write_file(path, self._buffer.numpy().data, page_aligned=True)


def _page_aligned(size: int) -> Tensor:
    """Allocate ``size`` bytes of page-aligned host memory, pinned if there is a GPU."""
    buffer = torch.empty(size + _PAGE, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    begin = -buffer.data_ptr() % _PAGE
    return buffer[begin : begin + size]


def write_file(path: Path, content: bytes | memoryview, *, page_aligned: bool = False) -> dict[str, Any]:
    """Write a file and sync it to disk.

    Args:
        path: Output file.
        content: Content of the file.
        page_aligned: ``True`` if ``content`` is page-aligned in memory. The write then bypasses the page
            cache if the file system supports it. A copy into the page cache costs CPU time that training
            needs, and evicts data that will be read again.

    Returns:
        Name, size and SHA-256 of the file, for the manifest.

    Raises:
        UserError: The file cannot be written; the partial file is deleted.
    """
    content = memoryview(content)
    digest = hashlib.sha256()
    whole_pages = len(content) // _PAGE * _PAGE if page_aligned else 0
    with writing(path):
        try:
            with path.open("wb", buffering=0) as file:
                _set_direct_io(file, page_aligned)
                for piece in _write_blocks(file, content[:whole_pages]):
                    digest.update(piece)
                _set_direct_io(file, False)
                for piece in _write_blocks(file, content[whole_pages:]):
                    digest.update(piece)
            sync_to_disk(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return {"name": path.name, "bytes": len(content), "sha256": digest.hexdigest()}


def _write_blocks(file: FileIO, content: memoryview) -> Iterator[memoryview]:
    """Write the content in blocks and yield each block after it is written."""
    while content:
        try:
            # Short write: a nearly full disk accepts fewer bytes.
            count = file.write(content[:_BLOCK])
        except OSError as error:
            if error.errno == errno.EINVAL and _set_direct_io(file, False):
                continue
            raise
        beat()
        yield content[:count]
        content = content[count:]


def _set_direct_io(file: FileIO, enabled: bool) -> bool:
    """Enable or disable ``O_DIRECT`` for the next writes; return ``True`` if the flag changed.

    If the operating system or file system does not support it, writes go through the page cache.
    """
    if sys.platform != "linux":
        return False
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    new_flags = flags | os.O_DIRECT if enabled else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, new_flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return new_flags != flags


def lower_priority() -> None:
    """Set this thread to the lowest CPU priority, so checkpoint writes do not slow down training.

    Linux only, where each thread has its own priority; a no-op elsewhere.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


class StoredSlices:
    """Index of the slices in shard files, by kind and parameter.

    Args:
        paths: Shard files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._slices: dict[str, list[tuple[int, Path, str]]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    name, _, start = key.rpartition("/")
                    self._slices.setdefault(name, []).append((int(start), path, key))

    def copy(self, kind: str, piece: Piece, target: Tensor) -> None:
        """Fill a piece from all slices that overlap it.

        Raises:
            UserError: The slices do not cover the piece.
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
        for start, path, key in self._slices.get(name, []):
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(key)
                length = stored.get_shape()[0]
                first, last = max(begin, start), min(end, start + length)
                if first < last:
                    yield first, stored[first - start : last - start]
