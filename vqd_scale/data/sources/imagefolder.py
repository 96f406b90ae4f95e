"""Image folder with captions in text files or in a table, as shards."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.sources.base import (
    CaptionFile,
    Encoding,
    ImageSource,
    Png,
    SourceImage,
    images_of,
    name_below,
)
from vqd_scale.data.sources.metadata import metadata_files, read_metadata


class ImageFolderConfig(ImageSource):
    """Pack a folder of images with captions: a .txt file of the same name for each, or metadata.jsonl.

    ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` name images of their folder by ``file_name``,
    as in Hugging Face's image folders.
    """

    name: ClassVar[str] = "imagefolder"
    example: ClassVar[str] = "my_images runs/mine image_size=128"
    encoding: Encoding = Png()
    """Storage format of the images; ``png`` by default, so that all images get ``image_size``."""
    caption_column: str | None = None
    """Column of the captions in the metadata. ``null``: ``text``, ``caption``, ``captions`` or ``prompt``."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return all images below a folder, sorted by path."""
        listing = list_folder(folder)
        files, tables = set(listing.files), metadata_files(listing)
        rows = [row for table in tables for row in read_metadata(table, files, folder, self.caption_column)]
        images = [SourceImage(row.image, "", row.name, fault=row.fault) for row in rows if row.fault]
        captions: dict[Path, tuple[str, ...]] = {row.image: () for row in rows}
        for row in rows:
            captions[row.image] += row.captions
        for path in {*captions, *images_of(listing)}.difference(tables):
            text, source = path.with_suffix(".txt"), name_below(path, folder)
            if path in captions:
                # Without captions, the row is in the list already.
                images += [SourceImage(path, "", source, captions[path])] if captions[path] else []
            elif text in files:
                images.append(SourceImage(path, "", source, CaptionFile(text, by_line=False)))
            else:
                fault = f"has no caption; write it to a file '{text.name}', or add a row to metadata.jsonl"
                images.append(SourceImage(path, "", source, fault=fault))
        images.sort(key=lambda image: (image.path, image.source))
        texts = [image.captions.path for image in images if isinstance(image.captions, CaptionFile)]
        listing.report([*(image.path for image in images), *texts, *tables])
        return [dataclasses.replace(image, key=f"{number:09d}") for number, image in enumerate(images)]
