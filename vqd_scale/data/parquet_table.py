"""Reading of Parquet files with the optional package pyarrow."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path


class ParquetTable:
    """Parquet file, read by row groups.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """

    def __init__(self, path: Location) -> None:
        try:
            # Any: an optional package, untyped if it is not installed.
            arrow: Any = importlib.import_module("pyarrow")
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: reading parquet files needs pyarrow; install it with "
                f"pip install 'vqd-scale[parquet]'."
            ) from None
        self._path, self._errors = path, (arrow.ArrowException, OSError, ValueError)
        try:
            self._file = parquet.ParquetFile(
                arrow.BufferReader(path.read_bytes()) if isinstance(path, S3Path) else path
            )
        except self._errors as error:
            raise self._unreadable(error) from None
        self.columns: tuple[str, ...] = tuple(self._file.schema_arrow.names)
        metadata = self._file.metadata
        self.group_sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def rows(self, group: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows of a row group.

        Args:
            group: Number of the row group.
            columns: Columns to read; None reads all.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            return self._file.read_row_group(group, columns=columns).to_pylist()
        except self._errors as error:
            raise self._unreadable(error) from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for group in range(len(self.group_sizes)):
            yield from self.rows(group)

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self._path}: not a readable parquet file ({error}); fetch it again.")
