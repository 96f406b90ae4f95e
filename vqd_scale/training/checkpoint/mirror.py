"""Copies of checkpoints elsewhere, such as in S3: sent when they are whole, fetched where none is left."""

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

_WHOLE = ".json"
"""Ending of what says that a copy is whole."""


def send(checkpoint: Path, place: Location, manifest: str) -> None:
    """Copy a whole checkpoint; what goes wrong is a warning and no more.

    Args:
        checkpoint: Its folder.
        place: Where a folder of the same name is to be, and beside it, last of all, its manifest once more.
        manifest: The file that makes a folder a checkpoint.
    """
    try:
        for file in sorted(checkpoint.iterdir()):
            _copy(file, place / checkpoint.name / file.name)
        _copy(checkpoint / manifest, place / f"{checkpoint.name}{_WHOLE}")
    except UserError as error:
        logger.warning("the checkpoint at %s images was not copied: %s", int(checkpoint.name), error)


def fetch_newest(place: Location, folder: Path, manifest: str) -> None:
    """Bring the newest copy back into a folder that has no checkpoint.

    Whether each file is what the manifest says is looked at when it is loaded, as always.

    Args:
        place: Where `send` copied to.
        folder: The run's checkpoints.
        manifest: The file that makes a folder a checkpoint.

    Raises:
        UserError: A copy cannot be read, or not be written here.
    """
    names = [name.removesuffix(_WHOLE) for name in file_sizes(place) if name.endswith(_WHOLE)]
    whole = sorted(name for name in names if name.isdigit())
    if not whole:
        return
    copy, final = place / whole[-1], folder / whole[-1]
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
    logger.info("the checkpoint at %d images was fetched from %s", int(final.name), place)


def _copy(file: Path, target: Location) -> None:
    with published(target) as partial:
        shutil.copyfile(file, partial)
