"""Checkpoints: named slices, published, not written.

Every rank writes its pieces of the weights, of the optimizer's moments and of the average as one safetensors
file of flat slices, ``{kind}/{parameter}/{start}``. The folder gets its name, and its manifest, only when all
files are on the disk. Loading copies the overlap of whatever slices there are with whatever pieces this rank
holds, so any number of ranks reads what any other number wrote. Nothing is pickled.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.store import PARTIAL, publish_json, read_json, sha256_of, sync_to_disk, writing
from vqd_scale.core.world import World
from vqd_scale.training.ema import EMA
from vqd_scale.training.partition import Partition, Piece

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.safetensors"
_FORMAT = 1


class CheckpointConfig(Config):
    """When to save, and how much to keep."""

    every: PositiveInt = 500_000
    """Images between two checkpoints."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back beside the weights.

    Attributes:
        images: Images the run had seen.
        state: The task's own tensors, equal on every rank.
    """

    images: int
    state: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they lie, one folder each, named by images seen.
        config: When to save, and how much to keep.
        partition: This rank's pieces.
        ema: Their average.
        world: This process's place among the ranks.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, partition: Partition, ema: EMA, world: World
    ) -> None:
        self.folder = folder
        self.config = config
        self.partition = partition
        self.ema = ema
        self.world = world

    def save(self, images: int, state: Mapping[str, Tensor]) -> None:
        """Save the run; all ranks call it together.

        Args:
            images: Images seen.
            state: The task's own tensors, equal on every rank.

        Raises:
            UserError: Some rank could not write; the unfinished folder is gone, older ones are untouched.
        """
        final = self.folder / f"{images:012d}"
        if self.world.any(final.exists()):
            return
        partial = final.with_name(final.name + PARTIAL)
        try:
            self._together(lambda: self._write(partial, images, state) if self.world.is_first else None)
            self._together(lambda: self._write_slices(partial))
            written = self.world.gathered(self._described(partial / self._slices_name()))
            self._together(
                lambda: self._publish(partial, final, images, written) if self.world.is_first else None
            )
        except UserError:
            if self.world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def resume(self) -> Restored | None:
        """Load the newest checkpoint whose every file is what its manifest says; all ranks call it together.

        Returns:
            What was restored, or ``None`` if the run has no checkpoint yet.

        Raises:
            UserError: There are checkpoints, but none is whole; or they belong to another model.
        """
        candidates = sorted((path.parent for path in self.folder.glob(f"*/{_MANIFEST}")), reverse=True)
        candidates = [path for path in candidates if not path.name.endswith(PARTIAL)]
        for candidate in candidates:
            damage = self._damage(candidate)
            if self.world.any(damage is not None):
                logger.warning(
                    "%s: not used, %s; trying the one before.", candidate, damage or "a rank found damage"
                )
                continue
            return self._load(candidate)
        if candidates:
            raise UserError(
                f"{self.folder}: no checkpoint in it is whole; restore one, or start in a new folder."
            )
        return None

    def _together(self, action: Callable[[], None]) -> None:
        """Do something on this rank and fail on all ranks if it fails on one."""
        mistake: UserError | None = None
        try:
            action()
        except UserError as error:
            mistake = error
        if self.world.any(mistake is not None):
            raise mistake or UserError(
                f"{self.folder}: another rank could not write its part of the checkpoint."
            )

    def _slices_name(self) -> str:
        return f"slices-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"

    def _write(self, partial: Path, images: int, state: Mapping[str, Tensor]) -> None:
        with writing(partial):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        _save(partial / _STATE, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})

    def _write_slices(self, partial: Path) -> None:
        slices = {
            f"{kind}/{piece.name}/{piece.start}": self.partition.view(flats, piece).detach().cpu()
            for kind, flats in self._kinds().items()
            for piece in self.partition.pieces
            if piece.length
        }
        _save(partial / self._slices_name(), slices)

    def _described(self, path: Path) -> dict[str, Any]:
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}

    def _publish(self, partial: Path, final: Path, images: int, written: list[dict[str, Any]]) -> None:
        manifest = {
            "format": _FORMAT,
            "images": images,
            "optimizer_steps": self.partition.steps,
            "ranks": self.world.size,
            "parameters": {piece.name: list(piece.shape) for piece in self.partition.pieces},
            "files": [*written, self._described(partial / _STATE)],
        }
        publish_json(partial / _MANIFEST, manifest)
        with writing(final):
            partial.rename(final)
            sync_to_disk(self.folder)
        for old in sorted(path for path in self.folder.iterdir() if path.name.isdigit())[: -self.config.keep]:
            shutil.rmtree(old)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of a checkpoint's files; every file is some rank's."""
        try:
            files = read_json(folder / _MANIFEST, "checkpoint manifest")["files"]
        except UserError as error:
            return str(error)
        for file in files[self.world.rank :: self.world.size]:
            path = folder / file["name"]
            if not path.is_file():
                return f"{path.name} is missing"
            if path.stat().st_size != file["bytes"] or sha256_of(path) != file["sha256"]:
                return f"{path.name} is damaged"
        return None

    def _load(self, folder: Path) -> Restored:
        manifest = read_json(folder / _MANIFEST, "checkpoint manifest")
        ours = {piece.name: list(piece.shape) for piece in self.partition.pieces}
        if manifest["parameters"] != ours:
            differing = _differing(manifest["parameters"], ours)
            raise UserError(
                f"{folder}: this checkpoint is of another model (first difference: {differing[0]}); "
                f"use the configuration it was written with, or another run folder."
            )
        stored = _StoredSlices(folder)
        for kind, flats in self._kinds().items():
            for piece in self.partition.pieces:
                stored.copy(kind, piece, self.partition.view(flats, piece))
        self.partition.steps = int(manifest["optimizer_steps"])
        self.partition.masters_changed()
        return Restored(int(manifest["images"]), load_file(folder / _STATE))

    def _kinds(self) -> dict[str, list[Tensor]]:
        return {
            "master": self.partition.masters,
            "exp_avg": self.partition.moments("exp_avg"),
            "exp_avg_sq": self.partition.moments("exp_avg_sq"),
            "ema": self.ema.flats,
        }


def consolidated(folder: Path, kind: str) -> dict[str, Tensor]:
    """Whole parameters from a checkpoint's slices, on the CPU in float32.

    Args:
        folder: One checkpoint.
        kind: ``ema`` or ``master``.

    Returns:
        Parameters by name.

    Raises:
        UserError: There is no whole checkpoint in the folder.
    """
    manifest = read_json(folder / _MANIFEST, "checkpoint manifest")
    stored = _StoredSlices(folder)
    parameters: dict[str, Tensor] = {}
    for name, shape in manifest["parameters"].items():
        flat = torch.empty(torch.Size(shape).numel())
        stored.copy(kind, Piece(name, tuple(shape), 0, flat.numel(), 0, 0), flat)
        parameters[name] = flat.view(shape)
    return parameters


class _StoredSlices:
    """All slices of a checkpoint, by what they are slices of."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, list[tuple[int, Path, str]]] = {}
        for path in sorted(folder.glob("slices-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    name, _, start = key.rpartition("/")
                    self._places.setdefault(name, []).append((int(start), path, key))

    def copy(self, kind: str, piece: Piece, target: Tensor) -> None:
        """Fill a piece's elements from every slice that overlaps it."""
        filled = 0
        for start, values in self._overlapping(
            f"{kind}/{piece.name}", piece.start, piece.start + piece.length
        ):
            target[start - piece.start : start - piece.start + len(values)].copy_(values)
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


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise UserError(
            f"{path}: the checkpoint cannot be written ({error}); free some space and start again."
        ) from None
    sync_to_disk(path)


def _differing(theirs: Mapping[str, list[int]], ours: Mapping[str, list[int]]) -> list[str]:
    return sorted(
        f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
        for name in theirs.keys() | ours.keys()
        if theirs.get(name) != ours.get(name)
    )
