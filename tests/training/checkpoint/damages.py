"""Damages of a file, by name."""

from collections.abc import Callable
from pathlib import Path

PAGE = 4096


def zero_a_page(path: Path) -> None:
    """Replace a page in the last quarter by zeros; a shard has its EMA there."""
    content = path.read_bytes()
    begin = len(content) * 7 // 8 // PAGE * PAGE
    end = min(begin + PAGE, len(content))
    path.write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    assert path.read_bytes() != content


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "zeroed page": zero_a_page,
    "flipped byte": flip_a_byte,
    "emptied": empty,
    "missing": Path.unlink,
}
