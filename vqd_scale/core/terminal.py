"""Output of tools without the control characters and the lengths that names, keys and arguments may have."""

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing them; tabs, line feeds and carriage returns remain."""
_CURSOR_UP = re.compile(r"(\x1b\[A)+")
"""Sequence that tqdm writes between nested bars."""


def escaped(text: str) -> str:
    """Return text with an escape in the place of each control character."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(text: str, length: int) -> str:
    """Return text of at most ``length`` characters; the middle of a longer one is left out."""
    return text if len(text) <= length else f"{text[: length - length // 4 - 1]}…{text[-(length // 4) :]}"


@contextmanager
def escaped_output() -> Generator[None]:
    """Escape all text that is printed on stdout and stderr, by whatever library, in the ``with`` body."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Escaping(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Escaping:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text if _CURSOR_UP.fullmatch(text) else escaped(text))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of a stream
        return getattr(self._stream, name)
