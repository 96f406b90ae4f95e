"""Sharded, asynchronous checkpoints, published by an atomic rename.

Every rank writes its shard (`vqd_scale.training.checkpoint.shards`) in a thread, with size and digest in a
JSON file next to it. The first rank's thread waits for all of these JSON files, writes the manifest and
renames the folder. Only a folder with a valid manifest is a checkpoint; leftovers of a kill or a full disk
are ignored. Nothing is pickled, and no thread communicates with another rank.
"""

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from vqd_scale.core.atomic_io import (
    PARTIAL,
    publish_json,
    read_json,
    sha256_of,
    sync_to_disk,
    writing,
)
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import differences
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.mirror import fetch_newest, send
from vqd_scale.training.checkpoint.shards import HostSlices, StoredSlices, lower_priority, write_file
from vqd_scale.training.config import CheckpointConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.partition import Partition, Piece
from vqd_scale.training.periods import is_due

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.safetensors"
_DESCRIPTION = ".json"
_FORMAT = 2
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Restored:
    """Restored run state apart from weights, moments and EMA.

    Attributes:
        images: Images seen.
        state: Other tensors of the run, equal on every rank.
    """

    images: int
    state: dict[str, Tensor]


@dataclass(frozen=True)
class _Save:
    """Save in progress.

    Attributes:
        folder: Final path of the checkpoint.
        write: Future that completes when this rank's files are on disk.
        publication: Future that completes when the folder is renamed; first rank only.
        abandoned: Event that is set when a rank fails to write.
    """

    folder: Path
    write: "Future[None]"
    publication: "Future[None] | None"
    abandoned: threading.Event


class Checkpoints:
    """Checkpoint manager of one run.

    Args:
        folder: Parent folder; each checkpoint is a subfolder named by images seen.
        config: Checkpoint period, retention and mirror.
        partition: Pieces of this rank.
        ema: EMA of the weights.
        world: This process's rank and device.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, partition: Partition, ema: EMA, world: World
    ) -> None:
        self.folder = folder
        self.config = config
        self.partition = partition
        self.ema = ema
        self.world = world
        self._host: HostSlices | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=lower_priority)
        self._save: _Save | None = None
        self._failures = 0

    def save(self, images: int, state: Mapping[str, Tensor], *, must: bool = False) -> None:
        """Wait for the previous save, then start a new one; collective.

        Args:
            images: Images seen.
            state: Other tensors of the run, equal on every rank.
            must: Wait for this save and raise if it fails.

        Raises:
            UserError: More than ``max_consecutive_failures`` saves failed in a row, or a save with ``must``
                failed.
        """
        self._wait_with_tolerance()
        final = self.folder / f"{images:012d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.world.is_first:
            for leftover in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover, ignore_errors=True)
        # Also a barrier: no rank writes before the leftovers of an earlier attempt are deleted.
        if self.world.any(final.exists()):
            return
        if self._host is None:
            self._host = HostSlices(self.partition, self._tensors())
        self._host.fill(self._tensors())
        abandoned = threading.Event()
        write = self._thread.submit(self._write_slices, self._host, partial)
        publication = None
        if self.world.is_first:
            state_file = serialize(
                {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            )
            manifest = {
                "format": _FORMAT,
                "images": images,
                "optimizer_steps": self.partition.steps,
                "ranks": self.world.size,
                "parameters": self._shapes(),
            }
            publication = self._thread.submit(self._publish, partial, final, manifest, state_file, abandoned)
        self._save = _Save(final, write, publication, abandoned)
        if must:
            self.wait()
        elif not self.config.asynchronous:
            self._wait_with_tolerance()

    def wait(self) -> None:
        """Wait for the save in progress, if any; collective.

        Raises:
            UserError: A rank could not write. Older checkpoints are unchanged.
        """
        save, self._save = self._save, None
        if save is None:
            return
        error = _error_of(save.write)
        if self.world.any(error is not None):
            save.abandoned.set()
        if save.publication is not None:
            # Always wait: after a failure it deletes the partial folder, which must end before the next save.
            publish_error = _error_of(save.publication)
            error = error or publish_error
        if self.world.any(error is not None):
            raise error or UserError(
                f"{save.folder}: another rank could not write its part of the checkpoint."
            )
        self._failures = 0

    def close(self) -> None:
        """Abandon a save in progress, for example after an error, and stop the thread."""
        if self._save is not None:
            self._save.abandoned.set()
        self._thread.shutdown(wait=True)

    def resume(self, before: int | None = None) -> Restored | None:
        """Load the newest checkpoint whose files all match the manifest; collective.

        Args:
            before: Consider only checkpoints with fewer images than this.

        Returns:
            The restored state, or ``None`` if the run has no checkpoint.

        Raises:
            UserError: No checkpoint is valid although some exist, or they belong to another model.
        """
        mirror = self.config.mirror
        if mirror is not None:
            # Fetch from the mirror if the folder has no checkpoint.
            self.world.on_first_rank(
                lambda: _named(self.folder) or fetch_newest(mirror, self.folder, _MANIFEST)
            )
        candidates = sorted(_named(self.folder), reverse=True)
        if before is not None:
            candidates = [path for path in candidates if int(path.name) < before]
        for candidate in candidates:
            reports = self.world.gathered({"damage": _damage(candidate, self.world.rank, self.world.size)})
            damage = next((report["damage"] for report in reports if report["damage"] is not None), None)
            if damage is None:
                return self._load(candidate)
            if self.world.is_first:
                logger.warning("%s: not used, %s; trying the previous checkpoint.", candidate, damage)
        if candidates:
            raise UserError(
                f"{self.folder}: contains no valid checkpoint; restore one, or start in a new folder."
            )
        return None

    def _wait_with_tolerance(self) -> None:
        try:
            self.wait()
        except UserError as error:
            self._failures += 1
            remaining_failures = self.config.max_consecutive_failures - self._failures
            if remaining_failures < 0:
                raise
            if self.world.is_first:
                logger.warning(
                    "NO CHECKPOINT WAS WRITTEN: %s Training continues; the newest checkpoint is still '%s', "
                    "and after %d more failures in a row the run stops.",
                    error,
                    max((path.name for path in _named(self.folder)), default="none"),
                    remaining_failures + 1,
                )

    def _slices_name(self) -> str:
        return f"slices-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"

    def _write_slices(self, host: HostSlices, partial: Path) -> None:
        with writing(partial):
            partial.mkdir(parents=True, exist_ok=True)
        path = partial / self._slices_name()
        publish_json(path.with_suffix(_DESCRIPTION), host.write(path))

    def _publish(
        self,
        partial: Path,
        final: Path,
        manifest: Mapping[str, Any],
        state_file: bytes,
        abandoned: threading.Event,
    ) -> None:
        """Wait for all ranks' files, write the manifest and rename the folder; first rank only."""
        state = write_file(partial / _STATE, state_file)
        descriptions = [
            partial / f"slices-{rank:05d}-of-{self.world.size:05d}{_DESCRIPTION}"
            for rank in range(self.world.size)
        ]
        while not abandoned.is_set() and not all(path.exists() for path in descriptions):
            time.sleep(_POLL_SECONDS)
        if abandoned.is_set():
            shutil.rmtree(partial, ignore_errors=True)
            return
        files = [read_json(path, "description of slices") for path in descriptions]
        try:
            publish_json(partial / _MANIFEST, _sealed({**manifest, "files": [*files, state]}))
            with writing(final):
                for path in descriptions:
                    path.unlink()
                partial.rename(final)
                sync_to_disk(self.folder)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        prune(self.folder, self.config)
        if self.config.mirror is not None:
            send(final, self.config.mirror, _MANIFEST)

    def _load(self, folder: Path) -> Restored:
        manifest = _manifest(folder)
        differing = sorted(differences(manifest["parameters"], self._shapes()))
        if differing:
            name, stored_shape, shape = differing[0]
            raise UserError(
                f"{folder}: this checkpoint is of another model (first difference: the shape of {name} is "
                f"{stored_shape} in the checkpoint and {shape} in the run); use the configuration it was "
                "written with, or another run folder."
            )
        stored = _stored(folder, manifest)
        for kind, flats in self._tensors().items():
            for piece in self.partition.pieces:
                stored.copy(kind, piece, self.partition.view(flats, piece))
        self.partition.steps = int(manifest["optimizer_steps"])
        self.partition.masters_changed()
        return Restored(int(manifest["images"]), load_file(folder / _STATE))

    def _shapes(self) -> dict[str, list[int]]:
        return {piece.name: list(piece.shape) for piece in self.partition.pieces}

    def _tensors(self) -> dict[str, list[Tensor]]:
        return {**self.partition.tensors(), "ema": self.ema.flats}


def consolidated(folder: Path, kind: str) -> dict[str, Tensor]:
    """Consolidate a checkpoint's slices into full parameters, on the CPU in float32.

    Args:
        folder: Folder of one checkpoint.
        kind: ``ema`` or ``master``.

    Returns:
        Parameters by name.

    Raises:
        UserError: The folder contains no valid checkpoint.
    """
    manifest = _manifest(folder)
    stored = _stored(folder, manifest)
    parameters: dict[str, Tensor] = {}
    for name, shape in manifest["parameters"].items():
        flat = torch.empty(torch.Size(shape).numel())
        stored.copy(kind, Piece(name, tuple(shape), 0, flat.numel(), 0, 0), flat)
        parameters[name] = flat.view(shape)
    return parameters


def newest_valid(folder: Path, images: int | None = None) -> Path:
    """Return the newest valid checkpoint of a run, or the one at a given number of images.

    Args:
        folder: Checkpoint folder of the run.
        images: Images seen by the checkpoint; ``None`` selects the newest.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    candidates = sorted(_named(folder), reverse=True)
    for candidate in candidates:
        if images is not None and int(candidate.name) != images:
            continue
        damage = _damage(candidate, 0, 1)
        if damage is None:
            return candidate
        logger.warning("%s: not used, %s.", candidate, damage)
    description = "checkpoint" if images is None else f"checkpoint at {images} images"
    existing = ", ".join(str(int(path.name)) for path in candidates) or "none"
    raise UserError(f"{folder}: contains no valid {description}; the existing ones are: {existing}.")


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Delete checkpoints beyond the retention policy, provided the newest one is complete."""
    checkpoints = sorted(_named(folder))
    if not checkpoints or not _is_complete(checkpoints[-1]):
        return
    permanent = config.keep_every_images
    for checkpoint in checkpoints[: -config.keep_last]:
        if permanent is not None and is_due(permanent, int(checkpoint.name), config.every_images):
            continue
        # Rename before deleting, so a partly deleted folder is not taken for a checkpoint.
        partial = checkpoint.rename(checkpoint.with_name(checkpoint.name + PARTIAL))
        shutil.rmtree(partial, ignore_errors=True)


def _damage(folder: Path, rank: int, ranks: int) -> str | None:
    """Verify this rank's part of a checkpoint's files; return a description of the damage, if any."""
    try:
        files = _manifest(folder)["files"]
    except UserError as error:
        return str(error).removeprefix(f"{folder / _MANIFEST}: ").removesuffix(".")
    for file in files[rank::ranks]:
        path = folder / file["name"]
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != file["bytes"] or sha256_of(path) != file["sha256"]:
            return f"{path.name} is damaged"
    return None


def _named(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit()]


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = _manifest(checkpoint)["files"]
        return all((checkpoint / file["name"]).stat().st_size == file["bytes"] for file in files)
    except (UserError, OSError):
        return False


def _error_of(future: "Future[None]") -> UserError | None:
    try:
        future.result()
    except UserError as error:
        return error
    return None


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with its own digest added."""
    return {**manifest, "sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _manifest(folder: Path) -> dict[str, Any]:
    """Read and verify a checkpoint's manifest.

    Raises:
        UserError: The manifest is missing or damaged, or has another format version.
    """
    path = folder / _MANIFEST
    content = read_json(path, "checkpoint manifest")
    manifest = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: {path.name} is damaged, or of another version of this program.")
    if _sealed({key: value for key, value in manifest.items() if key != "sha256"}) != manifest:
        raise UserError(f"{path}: {path.name} is damaged.")
    return manifest


def _stored(folder: Path, manifest: Mapping[str, Any]) -> StoredSlices:
    return StoredSlices(folder / file["name"] for file in manifest["files"] if file["name"] != _STATE)
