"""Captions in ``metadata.csv``, ``.jsonl`` or ``.parquet``, as in Hugging Face's image folders.

Each row names an image by ``file_name``, relative to the folder of the metadata, and has a column of text.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import JSON_OBJECT, parse_json, read_bounded
from vqd_scale.data.folder_walk import FolderListing
from vqd_scale.data.parquet_table import ParquetTable
from vqd_scale.data.shards.decode import BadSample, listed_captions
from vqd_scale.data.sources.base import name_below

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Columns that are taken for the captions if none is named."""


def metadata_files(listing: FolderListing) -> list[Path]:
    """Return the metadata files of a folder."""
    names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    return [path for path in listing.files if path.name in names]


class MetadataRow(NamedTuple):
    """Row of a metadata file.

    Attributes:
        image: Image file; the metadata file if the row names none.
        name: File and number of the row, for reports.
        captions: Captions of the image.
        fault: Reason why the row cannot be used.
    """

    image: Path
    name: str
    captions: tuple[str, ...] = ()
    fault: str = ""


def read_metadata(path: Path, files: set[Path], folder: Path, column: str | None) -> Iterator[MetadataRow]:
    """Yield the rows of a metadata file.

    Args:
        path: Metadata file.
        files: Files of the source. A path that leaves the folder names none of them.
        folder: Folder of the source.
        column: Column of the captions; None takes the first of `CAPTION_COLUMNS`.

    Raises:
        UserError: The file cannot be read.
    """
    root = folder.resolve()
    for number, row in _rows(path):
        image, row_name = path, f"{name_below(path, folder)}:{number}"
        try:
            if isinstance(row, BadSample):
                raise row
            name = row.get("file_name")
            if not isinstance(name, str):
                raise BadSample("has no 'file_name'")
            named_path = path.parent / name.replace("\\", "/")
            if named_path not in files:
                raise BadSample(f"names the file {name!r}, which is not in its folder")
            image = named_path
            if not image.resolve().is_relative_to(root):
                raise BadSample(f"names the file {name!r}, a link to another folder")
            yield MetadataRow(image, row_name, row_captions(row, column))
        except BadSample as error:
            yield MetadataRow(image, row_name, fault=str(error))


def row_captions(row: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    """Return the captions in a row of metadata.

    Raises:
        BadSample: The row has no caption, or one that is not text.
    """
    columns = CAPTION_COLUMNS if column is None else (column,)
    field = next((name for name in columns if name in row), None)
    if field is None:
        raise BadSample(f"has no column {' or '.join(columns)}, only {', '.join(map(str, row))}")
    captions = listed_captions(row, field)
    if not captions:
        raise BadSample(f"has an empty caption in '{field}'")
    return tuple(captions)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadSample]]:
    """Yield number and content of each row."""
    if path.suffix == ".parquet":
        yield from enumerate(ParquetTable(path), 1)
        return
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: these metadata cannot be read ({error}).") from None
    yield from enumerate(_csv_rows(path, text) if path.suffix == ".csv" else _json_rows(text.split("\n")), 1)


def _csv_rows(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise UserError(f"{path}: these metadata are not CSV ({error}).") from None


def _json_rows(lines: Iterable[str]) -> Iterator[Mapping[str, Any] | BadSample]:
    for line in lines:
        if line.strip():
            try:
                yield parse_json(line, JSON_OBJECT)
            except ValueError as error:
                yield BadSample(f"is not a line of JSON ({error})")
