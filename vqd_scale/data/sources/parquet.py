"""Parquet files with images and captions, such as datasets of Hugging Face, as shards."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vqd_scale.core.errors import UserError
from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.parquet_table import ParquetTable
from vqd_scale.data.shards.decode import BadSample
from vqd_scale.data.sources.base import ImageSource, SourceImage, name_below
from vqd_scale.data.sources.metadata import CAPTION_COLUMNS, row_captions


class ParquetConfig(ImageSource):
    """Pack Parquet files with a column of image files and one of captions; needs pyarrow.

    The column of images has the files' content, as bytes or as Hugging Face's ``{"bytes": …, "path": …}``.
    Without a column of captions the images are packed without captions.
    """

    name: ClassVar[str] = "parquet"
    example: ClassVar[str] = "/data/pokemon runs/pokemon files=train-*.parquet"
    files: str = "*.parquet"
    """Pattern of the names of the files to read. Name the training split if the folder has several."""
    image_column: str = "image"
    """Column of the images."""
    caption_column: str | None = None
    """Column of the captions. ``null``: ``text``, ``caption``, ``captions`` or ``prompt``, or no captions."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return the rows of all files, sorted by file.

        Raises:
            UserError: There is no such file, or one lacks a column.
        """
        listing = list_folder(folder)
        paths = [path for path in listing.files if path.match(self.files) and path.suffix == ".parquet"]
        listing.report(paths)
        if not paths:
            raise UserError(f"{folder}: holds no Parquet file '{self.files}'.")
        images: list[SourceImage] = []
        for path in paths:
            table, name = ParquetTable(path), name_below(path, folder)
            captions = (self.caption_column,) if self.caption_column else CAPTION_COLUMNS
            columns = [self.image_column, *[column for column in captions if column in table.columns][:1]]
            missing = {self.image_column, self.caption_column} - {None, *table.columns}
            if missing:
                raise UserError(
                    f"{path}: has no column '{min(map(str, missing))}', only {', '.join(table.columns)}; "
                    f"set image_column or caption_column."
                )
            rows = ((group, row) for group, size in enumerate(table.group_sizes) for row in range(size))
            images += [
                ParquetImage(
                    path, f"{len(images) + number:09d}", f"{name}:{number}", (), {}, "", tuple(columns), *row
                )
                for number, row in enumerate(rows)
            ]
        return images


@dataclass(frozen=True)
class ParquetImage(SourceImage):
    """Image in a row of a Parquet file.

    Attributes:
        columns: Column of the image and, if there is one, that of the captions.
        group: Row group of the file.
        row: Number of the row in its row group.
    """

    columns: tuple[str, ...] = ()
    group: int = 0
    row: int = 0

    def read(self) -> tuple[bytes, tuple[str, ...]]:
        """Return the content of the image file, and the captions."""
        row = _rows(self.path, self.group, self.columns)[self.row]
        image = row[self.columns[0]]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise BadSample(f"has no bytes in '{self.columns[0]}'")
        return data, row_captions(row, self.columns[1]) if len(self.columns) > 1 else ()


@functools.lru_cache(maxsize=1)
def _rows(path: Path, group: int, columns: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """Return the rows of a row group, cached because images are read in order."""
    return list(ParquetTable(path).rows(group, columns))
