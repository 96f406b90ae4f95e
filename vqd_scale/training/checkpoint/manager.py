"""Sharded, asynchronous checkpoints, published by an atomic rename.

Every rank writes its shard (`vqd_scale.training.checkpoint.shards`) in a thread, with size and digest in a
JSON file next to it. The first rank's thread waits for all of these JSON files, writes the manifest and
renames the folder. Only a folder whose files all match its manifest is a checkpoint. A damaged one is renamed
to ``NAME.damaged`` and written again when training reaches its image count. Nothing is pickled, and no thread
communicates with another rank.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from vqd_scale.core.atomic_io import (
    DAMAGED,
    PARTIAL,
    publish_json,
    sha256_of,
    sync_to_disk,
    writing,
)
from vqd_scale.core.errors import FirstRankError, UserError
from vqd_scale.core.nested import differences
from vqd_scale.core.watchdog import phase
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.manifest import (
    MANIFEST,
    DamageError,
    Manifest,
    SlicesDescription,
    StoredFile,
    is_checkpoint,
    parsed,
    verified,
)
from vqd_scale.training.checkpoint.mirror import Uploader, fetch_newest
from vqd_scale.training.checkpoint.retention import (
    damage_of,
    named_checkpoints,
    prune,
    set_aside_damaged,
)
from vqd_scale.training.checkpoint.shards import HostSlices, StoredSlices, lower_priority, write_file
from vqd_scale.training.config import CheckpointConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.partition import Partition, Piece

logger = logging.getLogger(__name__)

_STATE = "state.safetensors"
_DESCRIPTION = ".json"
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
        self._uploader = Uploader(config.mirror) if config.mirror is not None and world.is_first else None
        self._loaded: dict[Path, Manifest] = {}

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
            shutil.rmtree(partial, ignore_errors=True)
        # Also a barrier: no rank writes before the leftovers of an earlier attempt are deleted.
        if self.world.any(final.exists()) and self._verified(final, "and written again") is not None:
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
            manifest = Manifest(
                images=images,
                optimizer_steps=self.partition.steps,
                ranks=self.world.size,
                parameters=self._shapes(),
            )
            publication = self._thread.submit(self._publish, partial, final, manifest, state_file, abandoned)
        self._save = _Save(final, write, publication, abandoned)
        if must:
            self.wait()
        elif not self.config.asynchronous:
            self._wait_with_tolerance()

    @phase("save of a checkpoint", awaits_threads=True)
    def wait(self) -> None:
        """Wait for the save in progress, if any; collective.

        Raises:
            UserError: A rank could not write. Older checkpoints are unchanged.
        """
        save, self._save = self._save, None
        if save is None:
            return
        error = _error_of(save, save.write)
        if self.world.any(error is not None):
            save.abandoned.set()
        if save.publication is not None:
            publish_error = _error_of(save, save.publication)
            error = error or publish_error
        reports = self.world.gathered({"error": "" if error is None else str(error)})
        if messages := [report["error"] for report in reports if report["error"]]:
            # No rank writes any more.
            self._delete_partial(save)
            raise (UserError if self.world.is_first else FirstRankError)(messages[0])
        self._failures = 0

    def close(self, gives_up: Callable[[], bool] = lambda: False) -> None:
        """Abandon a save in progress, stop the thread, and wait for the uploads until ``gives_up`` holds."""
        if self._save is not None:
            self._save.abandoned.set()
        self._thread.shutdown(wait=True)
        if self._save is not None:
            self._delete_partial(self._save)
        if self._uploader is not None:
            self._uploader.wait(gives_up)

    def resume(self, before: int | None = None) -> Restored | None:
        """Load the newest checkpoint whose files all match the manifest; collective.

        Args:
            before: Consider only checkpoints with fewer images than this.

        Returns:
            The restored state, or ``None`` if the run has no checkpoint.

        Raises:
            UserError: No checkpoint is valid although some exist, or they belong to another model.
        """
        mirror = self.config.mirror if before is None else None
        if before is None and self.world.is_first:
            # Left behind by a kill. A save deletes only what is in its own place.
            for leftover in self.folder.glob(f"*{PARTIAL}"):
                if is_checkpoint(leftover.with_name(leftover.name.removesuffix(PARTIAL))):
                    shutil.rmtree(leftover, ignore_errors=True)
        while True:
            # The first rank's list counts: other nodes may see a shared file system in another state.
            listed = named_checkpoints(self.folder) if self.world.is_first else []
            names = self.world.gathered({"names": [path.name for path in listed]})[0]["names"]
            candidates = [name for name in names if before is None or int(name) < before]
            if candidates:
                folder = self.folder / candidates[-1]
                manifest = self._verified(folder, "trying the previous checkpoint")
                if manifest is not None:
                    if before is None and self._uploader is not None:
                        # The upload of an earlier start may have been cut off.
                        self._uploader.send(folder, only_if_missing=True)
                    self._loaded = {folder: manifest}
                    return self._load(folder, manifest)
            elif mirror is not None:
                source, mirror = mirror, None
                self.world.on_first_rank(lambda source=source: fetch_newest(source, self.folder))
            else:
                if before is None:
                    self.world.on_first_rank(self._check_none_was_damaged)
                return None

    def weights(self, images: int, use: Callable[[dict[str, Tensor]], object]) -> None:
        """Verify the checkpoint at ``images`` and call ``use`` with its EMA on the first rank; collective.

        Raises:
            UserError: The checkpoint is damaged; it is set aside, and the next start continues before it.
        """
        folder = self.folder / f"{images:012d}"
        manifest = self._loaded.get(folder) or self._verified(folder, "and written again by the next start")
        if manifest is None:
            raise UserError(f"{folder}: was damaged since it was written; run the same command again.")
        self.world.on_first_rank(lambda: use(_parameters(folder, manifest, "ema")))

    def _verified(self, folder: Path, consequence: str) -> Manifest | None:
        """Verify a checkpoint, each rank a part of the files; set it aside if it is damaged; collective."""
        manifest: Manifest | None = None
        report = {"error": "", "damage": ""}
        try:
            manifest = verified(folder, self.world.rank, self.world.size)
        except UserError as error:
            report["damage" if isinstance(error, DamageError) else "error"] = str(error)
        reports = self.world.gathered(report)
        errors, damages = ([item[kind] for item in reports if item[kind]] for kind in ("error", "damage"))
        if not errors and not damages:
            return manifest

        def settle() -> None:
            if errors:
                raise UserError(errors[0])
            set_aside_damaged(folder, damages[0], consequence)

        self.world.on_first_rank(settle)
        return None

    def _check_none_was_damaged(self) -> None:
        damaged = sorted(path.name for path in self.folder.glob(f"*{DAMAGED}*"))
        if damaged:
            raise UserError(
                f"{self.folder}: contains no valid checkpoint, as {', '.join(damaged)} had to be set aside; "
                "restore one from a copy, or delete these folders to start from the beginning."
            )

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
                    max((path.name for path in named_checkpoints(self.folder)), default="none"),
                    remaining_failures + 1,
                )

    def _delete_partial(self, save: _Save) -> None:
        """Delete what a failed save has written, which would fill the disk."""
        if self.world.is_first:
            shutil.rmtree(save.folder.with_name(save.folder.name + PARTIAL), ignore_errors=True)

    def _slices_name(self) -> str:
        return f"slices-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"

    def _write_slices(self, host: HostSlices, partial: Path) -> None:
        with writing(partial):
            partial.mkdir(parents=True, exist_ok=True)
        path = partial / self._slices_name()
        file = StoredFile(**host.write(path))
        if sha256_of(path) != file.sha256:
            raise UserError(f"{path}: damaged while it was written; check this disk.")
        older = named_checkpoints(self.folder)
        count = self.config.keep_last - 1
        older = older[len(older) - count :] if len(older) >= self.config.keep_last else []
        damages = {folder.name: damage_of(folder, self.world.rank, self.world.size) for folder in older}
        description = SlicesDescription(file=file, damages=damages)
        publish_json(path.with_suffix(_DESCRIPTION), description.model_dump())

    def _publish(
        self,
        partial: Path,
        final: Path,
        manifest: Manifest,
        state_file: bytes,
        abandoned: threading.Event,
    ) -> None:
        """Wait for all ranks' files, write the manifest and rename the folder; first rank only."""
        state = StoredFile(**write_file(partial / _STATE, state_file))
        descriptions = [
            partial / f"slices-{rank:05d}-of-{self.world.size:05d}{_DESCRIPTION}"
            for rank in range(self.world.size)
        ]
        while not abandoned.is_set() and not all(path.exists() for path in descriptions):
            time.sleep(_POLL_SECONDS)
        if abandoned.is_set():
            return
        parts = [parsed(SlicesDescription, path) for path in descriptions]
        manifest.files = [*(part.file for part in parts), state]
        publish_json(partial / MANIFEST, manifest.sealed())
        with writing(final):
            for path in descriptions:
                path.unlink()
            partial.rename(final)
            sync_to_disk(self.folder)
        damages = {final.name: ""}
        for name, damage in (item for part in parts for item in part.damages.items()):
            damages[name] = damages.get(name) or damage
        prune(self.folder, self.config, self._uploader and self._uploader.current, damages)
        if self._uploader is not None:
            self._uploader.send(final)

    def _load(self, folder: Path, manifest: Manifest) -> Restored:
        differing = sorted(differences(manifest.parameters, self._shapes()))
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
        self.partition.steps = manifest.optimizer_steps
        self.partition.masters_changed()
        return Restored(manifest.images, load_file(folder / _STATE))

    def _shapes(self) -> dict[str, list[int]]:
        return {piece.name: list(piece.shape) for piece in self.partition.pieces}

    def _tensors(self) -> dict[str, list[Tensor]]:
        return {**self.partition.tensors(), "ema": self.ema.flats}


def consolidated(folder: Path, kind: str) -> dict[str, Tensor]:
    """Verify a checkpoint and consolidate its slices into full parameters, on the CPU in float32.

    Args:
        folder: Folder of one checkpoint.
        kind: ``ema`` or ``master``.

    Raises:
        DamageError: The folder contains no valid checkpoint.
        UserError: A file cannot be read.
    """
    return _parameters(folder, verified(folder), kind)


def newest_consolidated(folder: Path, kind: str, images: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """Return images and parameters of the newest valid checkpoint, or of the one at a number of images.

    Args:
        folder: Checkpoint folder of the run.
        kind: ``ema`` or ``master``.
        images: Images seen by the checkpoint; ``None`` selects the newest.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    candidates = named_checkpoints(folder)[::-1]
    for candidate in candidates:
        if images in (None, int(candidate.name)):
            try:
                return int(candidate.name), consolidated(candidate, kind)
            except DamageError as damage:
                logger.warning("%s: not used, %s.", candidate, damage)
    description = "checkpoint" if images is None else f"checkpoint at {images} images"
    existing = ", ".join(str(int(path.name)) for path in candidates) or "none"
    raise UserError(f"{folder}: contains no valid {description}; the existing ones are: {existing}.")


def _parameters(folder: Path, manifest: Manifest, kind: str) -> dict[str, Tensor]:
    stored = _stored(folder, manifest)
    parameters: dict[str, Tensor] = {}
    for name, shape in manifest.parameters.items():
        flat = torch.empty(torch.Size(shape).numel())
        stored.copy(kind, Piece(name, tuple(shape), 0, flat.numel(), 0, 0), flat)
        parameters[name] = flat.view(shape)
    return parameters


def _error_of(save: _Save, future: "Future[None]") -> UserError | None:
    error = future.exception()
    if isinstance(error, OSError):
        # For example a file that another process deleted.
        return UserError(f"{save.folder}: cannot be written ({error}).")
    if error is not None and not isinstance(error, UserError):
        raise error
    return error


def _stored(folder: Path, manifest: Manifest) -> StoredSlices:
    return StoredSlices(folder / file.name for file in manifest.files if file.name != _STATE)
