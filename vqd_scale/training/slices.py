"""Named slices: what one rank holds of every weight, moment and average, in one safetensors file.

A slice is flat and named ``{kind}/{parameter}/{start}``. Reading copies the overlap of whatever slices there
are with whatever pieces are asked for, so any number of ranks reads what any other number wrote.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.store import sync_to_disk, writing
from vqd_scale.training.partition import Partition, Piece

_ALIGNMENT = 8
_LAST_IN_LINE = 19
_ELEMENT = 4


class HostSlices:
    """A rank's slices in one buffer of the host's memory, as they lie in the file.

    The buffer is made once and kept: filling it is all that training waits for while a checkpoint is written.

    Args:
        partition: Says which pieces there are.
        kinds: What there is of each piece: its weights, moments, average.
    """

    def __init__(self, partition: Partition, kinds: Iterable[str]) -> None:
        self._partition = partition
        self._places = [(kind, piece) for kind in kinds for piece in partition.pieces if piece.length]
        total = sum(piece.length for _, piece in self._places)
        self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=torch.cuda.is_available())
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
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text

    @torch.no_grad()
    def fill(self, flats: Mapping[str, list[Tensor]]) -> None:
        """Copy the slices as they are now.

        Args:
            flats: The flat float32 tensors of each kind, one a group.
        """
        begin = 0
        for kind, piece in self._places:
            source = self._partition.view(flats[kind], piece)
            self._buffer[begin : begin + piece.length].copy_(source, non_blocking=True)
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
        return write_described(path, [self._header, self._buffer.view(torch.uint8).numpy().data])


def write_described(path: Path, blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, down to the disk.

    Returns:
        Its name, size and SHA-256, for a manifest.

    Raises:
        UserError: It cannot be written; nothing of it is left.
    """
    digest, size = hashlib.sha256(), 0
    with writing(path):
        try:
            with path.open("wb") as file:
                for block in blocks:
                    file.write(block)
                    digest.update(block)
                    size += len(block)
            sync_to_disk(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}


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
