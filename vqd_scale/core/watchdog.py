"""Watchdog of a process: without progress, it writes the stack traces of all threads and exits the process.

Code that takes long names its phase and records progress with `beat`. Progress of any rank counts for all,
since ranks wait for one another: for the first rank's sample images, or for the slowest disk. In a hung run
no rank progresses, and the watchdog of every rank fires.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from vqd_scale.core.signals import HUNG_EXIT_CODE

_LONGEST_INTERVAL = 10.0

_watchdogs: list["Watchdog"] = []
"""The running watchdog of this process, if any."""


class Watchdog:
    """Hang detector of this process; `watched` starts it.

    Args:
        seconds: Longest time without progress.
        report: File for the stack traces, which also go to the standard error stream.

    Attributes:
        phase: Description of the present work.
        awaits_threads: True if the main thread waits for others, whose progress then counts.
    """

    def __init__(self, seconds: float, report: Path | None) -> None:
        self.phase = "start"
        self.awaits_threads = False
        self._seconds = seconds
        self._report = report
        self._interval = min(_LONGEST_INTERVAL, seconds / 10)
        self._beats = 0
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._start_thread(self._watch)

    def beat(self) -> None:
        """Record progress."""
        self._beats += 1
        self._last = time.monotonic()

    def share(self, add: Callable[[int], int]) -> None:
        """Count progress of any rank.

        Args:
            add: Function that adds to a counter of all ranks and returns its value.
        """
        # A thread of its own: the counter's host may be frozen.
        self._start_thread(lambda: self._exchange(add))

    def close(self) -> None:
        """Stop the threads."""
        self._stop.set()

    def _start_thread(self, function: Callable[[], None]) -> None:
        threading.Thread(target=function, name="watchdog", daemon=True).start()

    def _exchange(self, add: Callable[[int], int]) -> None:
        beats, total = self._beats, 0
        while not self._stop.wait(self._interval):
            has_progressed, beats = self._beats != beats, self._beats
            try:
                previous, total = total, add(int(has_progressed))
            except RuntimeError:
                # The first rank has left, or is lost: from now on only this rank's own progress counts.
                return
            if total != previous:
                self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            idle = time.monotonic() - self._last
            if idle > self._seconds:
                self._exit(idle)

    def _exit(self, idle: float) -> None:
        message = f"no progress for {idle:.0f} s in this phase: {self.phase}; the stacks of all threads:\n"
        try:
            sys.stderr.write(message)
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if self._report is not None and self._report.parent.is_dir():
                with self._report.open("a", encoding="utf-8") as file:
                    file.write(message)
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
        finally:
            # No cleanup: it would wait for the hung operation.
            os._exit(HUNG_EXIT_CODE)


@contextmanager
def watched(seconds: float | None, report: Path | None = None) -> Generator[None]:
    """Watch the process during the block, unless it is watched already.

    Args:
        seconds: Longest time without progress; None watches nothing.
        report: File for the stack traces, in a folder that may be absent.
    """
    if seconds is None or _watchdogs:
        yield
        return
    watchdog = Watchdog(seconds, report)
    _watchdogs.append(watchdog)
    try:
        yield
    finally:
        _watchdogs.remove(watchdog)
        watchdog.close()


@contextmanager
def phase(description: str, *, awaits_threads: bool = False) -> Generator[None]:
    """Describe the work of the block, for the report of a hang; its start and end are progress.

    Args:
        description: Noun phrase.
        awaits_threads: True if the main thread waits for others, whose progress then counts.
    """
    beat()
    outer = [(watchdog, watchdog.phase, watchdog.awaits_threads) for watchdog in _watchdogs]
    for watchdog in _watchdogs:
        watchdog.phase, watchdog.awaits_threads = description, awaits_threads
    try:
        yield
    finally:
        for watchdog, outer_phase, outer_awaits_threads in outer:
            watchdog.phase, watchdog.awaits_threads = outer_phase, outer_awaits_threads
        beat()


def beat() -> None:
    """Record progress; that of other threads counts only while the main thread waits for them."""
    for watchdog in _watchdogs:
        if watchdog.awaits_threads or threading.current_thread() is threading.main_thread():
            watchdog.beat()


def is_watched() -> bool:
    """Return whether this process has a watchdog."""
    return bool(_watchdogs)


def share_progress(add: Callable[[int], int]) -> None:
    """Count progress of any rank; see `Watchdog.share`."""
    for watchdog in _watchdogs:
        watchdog.share(add)
