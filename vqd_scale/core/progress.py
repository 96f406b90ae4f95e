"""Progress with the time left, for everything that takes over two seconds."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(
    description: str, total: int, *, done: int = 0, unit: str = "it", quiet: bool = False
) -> "tqdm[Any]":
    """A bar on the standard error stream; a line every ten seconds where that is no terminal.

    Args:
        description: What is going on.
        total: How many units there are.
        done: How many were done before this process started; not counted into the speed.
        unit: What one unit is called.
        quiet: Show nothing (ranks other than the first).
    """
    # A bar without items to go through: the stubs know it as one of no type.
    bar: tqdm[Any] = tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        unit_scale=total > 10_000,
        disable=quiet,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    )
    return bar


def progress(
    items: Iterable[Item], description: str, total: int, *, done: int = 0, unit: str = "it"
) -> Iterator[Item]:
    """Yield items while a bar follows."""
    with progress_bar(description, total, done=done, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
