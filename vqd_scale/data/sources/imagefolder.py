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
    image_files,
    pack_images,
)


class ImageFolderConfig(PackingConfig):
    """Packing of an image folder."""

    encoding: Encoding = Png()


def write_imagefolder(config: ImageFolderConfig, images: Path, folder: Location) -> ShardSet:
    """Pack the images below a folder into shards.

    Raises:
        UserError: There is no image, one has no caption, too many are unusable, or ``folder`` contains
            another dataset or cannot be written.
    """
    paths = image_files(images)
    captionless = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if captionless:
        raise UserError(
            f"{captionless[0]}: this image has no caption, as {len(captionless)} of {len(paths)} have none; "
            f"write each one's caption to a file of its name, such as "
            f"'{captionless[0].with_suffix('.txt').name}'."
        )
    entries = [
        SourceImage(
            path,
            f"{number:09d}",
            path.relative_to(images).as_posix(),
            CaptionFile(path.with_suffix(".txt"), by_line=False),
        )
        for number, path in enumerate(paths)
    ]
    return pack_images(config, "imagefolder", entries, folder, root=images)
