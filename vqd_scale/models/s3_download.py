"""Download of complete model folders from S3; a network's weights are read completely in any case."""

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vqd_scale.core.atomic_io import file_sizes, parse_location, read_in_order, writing
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.s3 import S3Path


@contextmanager
def local_folder(location: Path | S3Path | str, subfolders: Sequence[str]) -> Generator[Path]:
    """Provide a local folder with the content of a location.

    Args:
        location: A local folder, returned as is; or an S3 folder, copied to a temporary folder for the
            duration of the context.
        subfolders: Subfolders to copy as well, if they exist.

    Raises:
        UserError: The location is empty, the disk is full, or S3 is unreachable or denies access.
    """
    try:
        source = parse_location(location)
    except ValueError as error:
        raise UserError(f"model: {error}.") from None
    if isinstance(source, Path):
        yield source
        return
    sizes = file_sizes(source)
    for subfolder in subfolders:
        sizes |= {f"{subfolder}/{name}": size for name, size in file_sizes(source / subfolder).items()}
    if not sizes:
        raise UserError(f"{source}: no model found.")
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as folder:
        with progress_bar("fetch", sum(sizes.values()), unit="B") as bar:
            for name in sizes:
                copy = Path(folder, name)
                with writing(copy):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with copy.open("wb") as file:
                        for block in read_in_order(source / name):
                            bar.update(file.write(block))
        yield Path(folder)
