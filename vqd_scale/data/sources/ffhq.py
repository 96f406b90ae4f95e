"""Flickr-Faces-HQ, or any folder of images without captions, as shards."""

from pathlib import Path

from vqd_scale.core.atomic_io import Location
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import PackingConfig, SourceImage, image_files, pack_images


class FFHQConfig(PackingConfig):
    """Packing of FFHQ."""


def write_ffhq(config: FFHQConfig, images: Path, folder: Location) -> ShardSet:
    """Pack ``00000/00000.png`` to ``69000/69999.png``, in that order, without captions.

    Source: Karras, Laine, Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks",
    CVPR 2019; the input folder is ``images1024x1024``.

    Raises:
        UserError: There is no image, too many images are unusable, or ``folder`` contains another dataset or
            cannot be written.
    """
    entries = [
        SourceImage(path, f"{number:09d}", path.relative_to(images).as_posix())
        for number, path in enumerate(image_files(images))
    ]
    return pack_images(config, "ffhq", entries, folder, root=images)
