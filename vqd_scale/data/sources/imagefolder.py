"""Image folder with one caption text file of the same name per image, as shards."""

from pathlib import Path

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import (
    CaptionFile,
    Encoding,
    PackingConfig,
    Png,
    SourceImage,
    pictures_below,
    write_pictures,
)


class ImageFolderConfig(PackingConfig):
    """Packing of an image folder."""

    encoding: Encoding = Png()


def write_imagefolder(config: ImageFolderConfig, pictures: Path, folder: Location) -> ShardSet:
    """Pack the images below a folder into shards.

    Raises:
        UserError: There is no image, one has no caption, too many are unusable, or ``folder`` contains
            another dataset or cannot be written.
    """
    found = pictures_below(pictures)
    silent = [path for path in found if not path.with_suffix(".txt").is_file()]
    if silent:
        raise UserError(
            f"{silent[0]}: this picture has no caption, as {len(silent)} of {len(found)} have none; write "
            f"each one's caption to a file of its name, such as '{silent[0].with_suffix('.txt').name}'."
        )
    listed = [
        SourceImage(
            path,
            f"{number:09d}",
            path.relative_to(pictures).as_posix(),
            CaptionFile(path.with_suffix(".txt"), by_line=False),
        )
        for number, path in enumerate(found)
    ]
    return write_pictures(config, "imagefolder", listed, folder, root=pictures)
