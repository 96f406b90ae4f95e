"""Safe parsing of JSON that others wrote: bounded size and depth, and a shape that is checked once.

Python's own parser accepts NaN, integers of any length and nesting up to its recursion limit, and leaves the
shape to each later access. Here pydantic parses and validates in one call, so a value either has the declared
shape or is refused with the place of the first difference.
"""

import os
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")

MAX_BYTES = 1 << 30
"""Maximum size of a JSON file in bytes; the index of a million shards has a tenth."""

MAX_SIZE = 1 << 20
"""Maximum number of channels, codes or positions in a configuration."""
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
"""Number of channels, codes or positions. The bound keeps a configuration of others from building more than
any machine holds before it is compared with its weights."""
Count = Annotated[int, Field(gt=0, le=1 << 10)]
"""Number of heads, multiples, rows or columns, bounded like `Size`."""
Depth = Annotated[int, Field(gt=0, le=1 << 8)]
"""Number of layers, bounded like `Size`."""

JSON: TypeAdapter[Any] = TypeAdapter(Any)
"""Shape of any JSON value."""
JSON_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
"""Shape of a JSON object with any content."""


def parse_json(data: bytes | str, shape: TypeAdapter[T]) -> T:
    """Parse JSON of a declared shape; strictly: ``true`` is no integer, and ``"5"`` no number.

    Args:
        data: UTF-8 bytes or text.
        shape: Expected shape, for example ``TypeAdapter(dict[str, list[int]])``.

    Raises:
        ValueError: Invalid JSON, nesting of more than 200 levels, a lone surrogate, or another shape; the
            message names the place of the first difference.
    """
    try:
        return shape.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place}: {message}" if place else message) from None


def read_bounded(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file of bounded size.

    Raises:
        OSError: The file is missing or unreadable.
        ValueError: It is no regular file (a folder, a device, a pipe), or larger than ``max_bytes``.
    """
    # Without O_NONBLOCK the open of a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"more than {max_bytes:,} bytes")
        return file.read()
