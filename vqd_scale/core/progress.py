"""Progress bars with the estimated time left, for every operation longer than two seconds.

tqdm, because its bars also appear in the log file of a job, where rich prints nothing before the end.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from vqd_scale.core.watchdog import beat

Item = TypeVar("Item")


class _ProgressBar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """Progress bar whose updates are progress for the watchdog."""

    def update(self, n: float | None = 1) -> bool | None:
        beat()
        return super().update(n)


def progress_bar(
    description: str, total: int, *, initial: int = 0, unit: str = "it", quiet: bool = False
) -> "tqdm[Any]":
    """Return a progress bar on stderr; it updates every ten seconds if stderr is not a terminal.

    Args:
        description: Label of the bar.
        total: Total number of units.
        initial: Units finished before this process started; excluded from the speed.
        unit: Name of one unit.
        quiet: Disable the bar (ranks other than 0).
    """
    # The stubs leave the item type of a bar without an iterable unknown.
    bar: tqdm[Any] = _ProgressBar(
        total=total,
        initial=initial,
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
    items: Iterable[Item], description: str, total: int, *, unit: str = "it", quiet: bool = False
) -> Iterator[Item]:
    """Yield items and advance a progress bar after each."""
    with progress_bar(description, total, unit=unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update()
