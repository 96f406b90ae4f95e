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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from vqd_scale.core.atomic_io import (
    PARTIAL,
    Location,
    publish_json,
    read_json,
    sha256_of,
    sync_to_disk,
    writing,
)
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.mirror import fetch_newest, send
from vqd_scale.training.checkpoint.shards import HostSlices, StoredSlices, give_way, write_described
from vqd_scale.training.ema import EMA
from vqd_scale.training.partition import Partition, Piece

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.safetensors"
_DESCRIPTION = ".json"
_FORMAT = 2
_KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_POLL_SECONDS = 0.05


class CheckpointConfig(Config):
    """Checkpoint period, retention and mirror."""

    every_images: PositiveInt = 500_000
    """Images between two checkpoints."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every_images: PositiveInt | None = None
    """Period in images of permanent checkpoints: the first one after each multiple is never deleted."""
    asynchronous: bool = True
    """Write in a thread while training continues; needs host memory for a copy of this rank's partition."""
    max_consecutive_failures: NonNegativeInt = 3
    """Maximum number of consecutive failed saves (disk full, no permission) before the run stops."""
    mirror: Location | None = None
    """Mirror, such as S3. Every checkpoint is copied to it, and the newest is fetched if the run folder has
    none."""


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
        written: Future that completes when this rank's files are on disk.
        published: Future that completes when the folder is renamed; first rank only.
        abandoned: Event that is set when a rank fails to write.
    """

    folder: Path
    written: "Future[None]"
    published: "Future[None] | None"
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
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)
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
        self._wait_and_tolerate()
        final = self.folder / f"{images:012d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.world.is_first:
            for leftover in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover, ignore_errors=True)
        # Also a barrier: no rank writes before the leftovers of an earlier attempt are deleted.
        if self.world.any(final.exists()):
            return
        if self._host is None:
            self._host = HostSlices(self.partition, _KINDS)
        self._host.fill(self._flats())
        abandoned = threading.Event()
        written = self._thread.submit(self._write_slices, self._host, partial)
        published = None
        if self.world.is_first:
            rest = serialised({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
            manifest = {
                "format": _FORMAT,
                "images": images,
                "optimizer_steps": self.partition.steps,
                "ranks": self.world.size,
                "parameters": {piece.name: list(piece.shape) for piece in self.partition.pieces},
            }
            published = self._thread.submit(self._publish, partial, final, manifest, rest, abandoned)
        self._save = _Save(final, written, published, abandoned)
        if must:
            self.wait()
        elif not self.config.asynchronous:
            self._wait_and_tolerate()

    def wait(self) -> None:
        """Wait for the save in progress, if any; collective.

        Raises:
            UserError: A rank could not write. Older checkpoints are unchanged.
        """
        save, self._save = self._save, None
        if save is None:
            return
        mistake = _mistake(save.written)
        if self.world.any(mistake is not None):
            save.abandoned.set()
        if save.published is not None:
            # Always wait: after a failure it deletes the partial folder, which must end before the next save.
            unpublished = _mistake(save.published)
            mistake = mistake or unpublished
        if self.world.any(mistake is not None):
            raise mistake or UserError(
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
            findings = self.world.gathered({"damage": _damage(candidate, self.world.rank, self.world.size)})
            damages = [finding["damage"] for finding in findings if finding["damage"] is not None]
            if not damages:
                return self._load(candidate)
            if self.world.is_first:
                logger.warning("%s: not used, %s; trying the one before.", candidate, damages[0])
        if candidates:
            raise UserError(
                f"{self.folder}: no checkpoint in it is whole; restore one, or start in a new folder."
            )
        return None

    def _wait_and_tolerate(self) -> None:
        try:
            self.wait()
        except UserError as error:
            self._tolerate(error)

    def _tolerate(self, mistake: UserError) -> None:
        self._failures += 1
        left = self.config.max_consecutive_failures - self._failures
        if left < 0:
            raise mistake
        if self.world.is_first:
            whole = max((path.name for path in _named(self.folder)), default="none")
            logger.warning(
                "NO CHECKPOINT WAS WRITTEN: %s Training goes on; the newest whole checkpoint is still '%s', "
                "and after %d more failures in a row the run stops.",
                mistake,
                whole,
                left + 1,
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
        rest: bytes,
        abandoned: threading.Event,
    ) -> None:
        """Wait for all ranks' files, write the manifest and rename the folder; first rank only."""
        state = write_described(partial / _STATE, rest)
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
        ours = {piece.name: list(piece.shape) for piece in self.partition.pieces}
        if manifest["parameters"] != ours:
            differing = _differing(manifest["parameters"], ours)
            raise UserError(
                f"{folder}: this checkpoint is of another model (first difference: {differing[0]}); "
                f"use the configuration it was written with, or another run folder."
            )
        stored = _stored(folder, manifest)
        for kind, flats in self._flats().items():
            for piece in self.partition.pieces:
                stored.copy(kind, piece, self.partition.view(flats, piece))
        self.partition.steps = int(manifest["optimizer_steps"])
        self.partition.masters_changed()
        return Restored(int(manifest["images"]), load_file(folder / _STATE))

    def _flats(self) -> dict[str, list[Tensor]]:
        return {
            "master": self.partition.masters,
            "exp_avg": self.partition.moments("exp_avg"),
            "exp_avg_sq": self.partition.moments("exp_avg_sq"),
            "ema": self.ema.flats,
        }


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


def newest_whole(folder: Path, images: int | None = None) -> Path:
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
    which = "checkpoint" if images is None else f"checkpoint at {images} images"
    there = ", ".join(str(int(path.name)) for path in candidates) or "none at all"
    raise UserError(f"{folder}: there is no whole {which} here; there are {there}.")


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Delete checkpoints beyond the retention policy, provided the newest one is complete."""
    checkpoints = sorted(_named(folder))
    if not checkpoints or not _is_complete(checkpoints[-1]):
        return
    for old in checkpoints[: -config.keep_last]:
        images, every = int(old.name), config.keep_every_images
        if every is not None and images // every > (images - config.every_images) // every:
            continue
        # Rename before deleting, so a partly deleted folder is not taken for a checkpoint.
        shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)), ignore_errors=True)


def _damage(folder: Path, rank: int, ranks: int) -> str | None:
    """Verify this rank's share of a checkpoint's files; return a description of the damage, if any."""
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


def _mistake(future: "Future[None]") -> UserError | None:
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
    read = read_json(path, "checkpoint manifest")
    manifest = cast(dict[str, Any], read) if isinstance(read, dict) else {}
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: {path.name} is damaged, or of another version of this program.")
    if _sealed({key: value for key, value in manifest.items() if key != "sha256"}) != manifest:
        raise UserError(f"{path}: {path.name} is damaged.")
    return manifest


def _stored(folder: Path, manifest: Mapping[str, Any]) -> StoredSlices:
    return StoredSlices(folder / file["name"] for file in manifest["files"] if file["name"] != _STATE)


def _differing(theirs: Mapping[str, Sequence[int]], ours: Mapping[str, Sequence[int]]) -> list[str]:
    return sorted(
        f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
        for name in theirs.keys() | ours.keys()
        if theirs.get(name) != ours.get(name)
    )
