"""What the benchmarks share: memory, fresh processes, and where a figure comes from."""

import gc
import multiprocessing
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def extra_peak(action: Callable[[], object]) -> int:
    """How many bytes this process's resident memory rises in an action above what it holds before (Linux)."""
    gc.collect()
    # Sets the process's high-water mark back to what it holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    action()
    return _resident_peak() - before


def in_fresh_process(measure: Callable[[], Result]) -> Result:
    """What a picklable function returns in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def provenance() -> dict[str, Any]:
    """Machine, versions and commit; every benchmark's result carries them."""
    return {"machine": _machine(), "versions": _versions(), "commit": _commit()}


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"processor": model, "threads": torch.get_num_threads(), "system": platform.system()}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def _commit() -> str:
    """The commit of the source tree; empty where there is none, as in an installed wheel."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    return found.stdout.strip()
