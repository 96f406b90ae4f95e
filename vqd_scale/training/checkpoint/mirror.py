"""Checkpoint mirror, such as S3: valid checkpoints are uploaded, and fetched if none is left locally."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread

from vqd_scale.core.atomic_io import (
    PARTIAL,
    Location,
    file_sizes,
    publish_json,
    published,
    sync_to_disk,
    writing,
)
from vqd_scale.core.errors import UserError
from vqd_scale.core.watchdog import phase
from vqd_scale.training.checkpoint.manifest import (
    MANIFEST,
    DamageError,
    copy_verified,
    is_checkpoint,
    read_manifest,
)

logger = logging.getLogger(__name__)

_COMPLETE = ".json"
"""Suffix of the marker object of a complete copy."""
_POLL_SECONDS = 0.05


class Uploader:
    """Thread that copies checkpoints to a mirror, one after the other.

    Training never waits for it. A stopped run leaves it behind, and the next start sends what is missing.

    Args:
        mirror: Mirror.

    Attributes:
        current: Checkpoint that is being copied, and must not be deleted; None in between.
    """

    def __init__(self, mirror: Location) -> None:
        self.current: Path | None = None
        self._failure: Exception | None = None
        self._mirror = mirror
        self._queue: Queue[tuple[Path, bool]] = Queue()
        Thread(target=self._work, name="mirror", daemon=True).start()

    def send(self, checkpoint: Path, *, only_if_missing: bool = False) -> None:
        """Copy a checkpoint after those before it.

        Args:
            checkpoint: Folder of the checkpoint.
            only_if_missing: Send nothing if the mirror has a complete copy.

        Raises:
            Exception: An earlier copy failed for a reason that is neither the mirror's nor the disk's.
        """
        self._raise_failure()
        self._queue.put((checkpoint, only_if_missing))

    def wait(self, gives_up: Callable[[], bool]) -> None:
        """Wait until all is sent, or a condition holds; raises as `send`."""
        with phase("upload to the mirror", awaits_threads=True):
            while self._queue.unfinished_tasks:
                if gives_up():
                    logger.warning("not all checkpoints were copied to the mirror; the next start continues.")
                    return
                time.sleep(_POLL_SECONDS)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            self.current, only_if_missing = self._queue.get()
            try:
                _send(self.current, self._mirror, only_if_missing)
            except Exception as error:  # noqa: BLE001 - raised in the main thread, which waits for this one
                self._failure = error
            self.current = None
            self._queue.task_done()


def _send(checkpoint: Path, mirror: Location, only_if_missing: bool) -> None:
    """Copy a checkpoint to the mirror; a failure or a damaged file is only logged as a warning.

    The mirror receives a folder of the same name and, last, a second copy of the manifest next to the folder,
    which marks the copy as complete.
    """
    copy = mirror / checkpoint.name
    try:
        if only_if_missing and f"{checkpoint.name}{_COMPLETE}" in file_sizes(mirror):
            return
        manifest = read_manifest(checkpoint)
        for file in manifest.files:
            with published(copy / file.name) as partial:
                copy_verified(checkpoint / file.name, partial, file)
        for target in (copy / MANIFEST, mirror / f"{checkpoint.name}{_COMPLETE}"):
            publish_json(target, manifest.sealed())
    except (UserError, OSError) as error:
        logger.warning(
            "the checkpoint at %s images was not copied to the mirror: %s", int(checkpoint.name), error
        )


def fetch_newest(mirror: Location, folder: Path) -> None:
    """Fetch the newest valid copy into a folder without checkpoints, if the mirror has copies.

    Args:
        mirror: Mirror to which an `Uploader` copied.
        folder: Checkpoint folder of the run.

    Raises:
        UserError: All copies are damaged, or one cannot be read, or cannot be written locally.
    """
    names = [name.removesuffix(_COMPLETE) for name in file_sizes(mirror) if name.endswith(_COMPLETE)]
    finals = sorted(filter(is_checkpoint, (folder / name for name in names)), reverse=True)
    for final in finals:
        partial = final.with_name(final.name + PARTIAL)
        try:
            _fetch(mirror / final.name, partial, final)
        except DamageError as damage:
            shutil.rmtree(partial, ignore_errors=True)
            logger.warning("%s: not used, %s; trying the previous copy.", mirror / final.name, damage)
        else:
            logger.info("the checkpoint at %d images was fetched from %s", int(final.name), mirror)
            return
    if finals:
        raise UserError(f"{mirror}: contains no valid copy of a checkpoint; start with another mirror.")


def _fetch(copy: Location, partial: Path, final: Path) -> None:
    manifest = read_manifest(copy)
    with writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in manifest.files:
            copy_verified(copy / file.name, partial / file.name, file)
            sync_to_disk(partial / file.name)
        publish_json(partial / MANIFEST, manifest.sealed())
        partial.rename(final)
        sync_to_disk(final.parent)
