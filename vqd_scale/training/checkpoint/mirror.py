"""Checkpoint mirror, such as S3: complete checkpoints are uploaded, and fetched if none is left locally."""

import logging
import shutil
from pathlib import Path

from vqd_scale.core.atomic_io import (
    PARTIAL,
    Location,
    file_sizes,
    published,
    read_in_order,
    read_json,
    sync_to_disk,
    writing,
)
from vqd_scale.core.errors import UserError

logger = logging.getLogger(__name__)

_COMPLETE = ".json"
"""Suffix of the marker object of a complete copy."""


def send(checkpoint: Path, mirror: Location, manifest: str) -> None:
    """Copy a complete checkpoint to the mirror; a failure is only logged as a warning.

    Args:
        checkpoint: Folder of the checkpoint.
        mirror: Mirror. It receives a folder of the same name and, last, a second copy of the manifest next to
            the folder, which marks the copy as complete.
        manifest: File name of the manifest.
    """
    try:
        for file in sorted(checkpoint.iterdir()):
            _copy(file, mirror / checkpoint.name / file.name)
        _copy(checkpoint / manifest, mirror / f"{checkpoint.name}{_COMPLETE}")
    except UserError as error:
        logger.warning(
            "the checkpoint at %s images was not copied to the mirror: %s", int(checkpoint.name), error
        )


def fetch_newest(mirror: Location, folder: Path, manifest: str) -> None:
    """Fetch the newest complete copy into a folder without checkpoints.

    Sizes and digests are verified when the checkpoint is loaded.

    Args:
        mirror: Mirror to which `send` copied.
        folder: Checkpoint folder of the run.
        manifest: File name of the manifest.

    Raises:
        UserError: A copy cannot be read, or cannot be written locally.
    """
    names = [name.removesuffix(_COMPLETE) for name in file_sizes(mirror) if name.endswith(_COMPLETE)]
    newest = max((name for name in names if name.isdigit()), default=None)
    if newest is None:
        return
    copy, final = mirror / newest, folder / newest
    partial = final.with_name(final.name + PARTIAL)
    files = [file["name"] for file in read_json(copy / manifest, "checkpoint manifest")["files"]]
    with writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in [*files, manifest]:
            with (partial / name).open("wb") as file:
                for block in read_in_order(copy / name):
                    file.write(block)
            sync_to_disk(partial / name)
        partial.rename(final)
        sync_to_disk(folder)
    logger.info("the checkpoint at %d images was fetched from %s", int(final.name), mirror)


def _copy(file: Path, target: Location) -> None:
    with published(target) as partial:
        shutil.copyfile(file, partial)
