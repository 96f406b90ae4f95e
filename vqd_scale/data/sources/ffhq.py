"""Flickr-Faces-HQ, or any folder of images without captions, as shards."""

from pathlib import Path
from typing import ClassVar

from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.sources.base import ImageSource, SourceImage, images_of, name_below


class FFHQConfig(ImageSource):
    """Pack FFHQ, or any folder of images without captions.

    The order is that of the paths, ``00000/00000.png`` to ``69000/69999.png``.

    Source: Karras, Laine, Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks",
    CVPR 2019; the input folder is ``images1024x1024``.
    """

    name: ClassVar[str] = "ffhq"
    example: ClassVar[str] = "/data/ffhq/images1024x1024 runs/ffhq encoding.kind=png image_size=256"

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return all images below a folder."""
        listing = list_folder(folder)
        paths = images_of(listing)
        listing.report(paths)
        return [
            SourceImage(path, f"{number:09d}", name_below(path, folder)) for number, path in enumerate(paths)
        ]
