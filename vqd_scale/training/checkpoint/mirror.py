"""Checkpoint mirror, such as S3: valid checkpoints are uploaded, and fetched if none is left locally."""

import logging
import shutil
from pathlib import Path

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


def send(checkpoint: Path, mirror: Location) -> None:
    """Copy a checkpoint to the mirror; a failure or a damaged file is only logged as a warning.

    Args:
        checkpoint: Folder of the checkpoint.
        mirror: Mirror. It receives a folder of the same name and, last, a second copy of the manifest next to
            the folder, which marks the copy as complete.
    """
    copy = mirror / checkpoint.name
    try:
        manifest = read_manifest(checkpoint)
        for file in manifest.files:
            with published(copy / file.name) as partial:
                copy_verified(checkpoint / file.name, partial, file)
        for target in (copy / MANIFEST, mirror / f"{checkpoint.name}{_COMPLETE}"):
            publish_json(target, manifest.sealed())
    except UserError as error:
        logger.warning(
            "the checkpoint at %s images was not copied to the mirror: %s", int(checkpoint.name), error
        )


def fetch_newest(mirror: Location, folder: Path) -> None:
    """Fetch the newest valid copy into a folder without checkpoints, if the mirror has copies.

    Args:
        mirror: Mirror to which `send` copied.
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
