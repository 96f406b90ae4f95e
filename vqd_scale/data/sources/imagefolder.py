"""Image folder with one caption text file of the same name per image, as shards."""

from pathlib import Path
from typing import ClassVar

from vqd_scale.core.errors import UserError
from vqd_scale.data.sources.base import CaptionFile, Encoding, ImageSource, Png, SourceImage, image_files


class ImageFolderConfig(ImageSource):
    """Pack a folder of images, each with its caption in a .txt file of the same name."""

    name: ClassVar[str] = "imagefolder"
    example: ClassVar[str] = "my_images runs/mine image_size=128"
    encoding: Encoding = Png()
    """Storage format of the images; ``png`` by default, so that all images get ``image_size``."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return all images below a folder."""
        paths = image_files(folder)
        captionless = [path for path in paths if not path.with_suffix(".txt").is_file()]
        if captionless:
            raise UserError(
                f"{captionless[0]}: this image has no caption, as {len(captionless)} of {len(paths)} have "
                f"none; write each one's caption to a file of its name, such as "
                f"'{captionless[0].with_suffix('.txt').name}'."
            )
        return [
            SourceImage(
                path,
                f"{number:09d}",
                path.relative_to(folder).as_posix(),
                CaptionFile(path.with_suffix(".txt"), by_line=False),
            )
            for number, path in enumerate(paths)
        ]
