"""Memory measurements and fresh processes for the benchmarks."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def extra_peak(action: Callable[[], object]) -> int:
    """Return the peak increase of this process's resident memory during an action, in bytes (Linux)."""
    _give_back_what_is_free()
    # Sets the process's high-water mark back to what it holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    action()
    return _resident("VmHWM") - before


def resident() -> int:
    """Return this process's resident memory in bytes (Linux)."""
    _give_back_what_is_free()
    return _resident("VmRSS")


def in_fresh_process(measure: Callable[[], Result]) -> Result:
    """Run a picklable function in a new process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def _give_back_what_is_free() -> None:
    gc.collect()
    # What glibc keeps of freed memory, to use it again, would hide the rise of whatever uses it again.
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
