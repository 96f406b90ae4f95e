"""Provenance of results: machine, package versions and state of the source tree."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "deepspeed", "xformers", "webdataset", "open-clip-torch", "torch-fidelity", "numpy")


def provenance() -> dict[str, Any]:
    """Return machine, versions and commit, as stored with every benchmark result and in every run folder."""
    return {"machine": _machine(), "versions": _versions(), "commit": _git("rev-parse", "HEAD")}


def modified_files() -> list[str]:
    """Return the tracked files that differ from the commit; empty outside a source tree."""
    return [line[3:] for line in _git("status", "--porcelain", "--untracked-files=no").splitlines()]


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "processor": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str:
    """Return git's output for the source tree; empty without one, as in an installed wheel."""
    git = shutil.which("git")
    if git is None:
        return ""
    # Without locks: a run killed during this call must not leave a lock file in the user's checkout.
    command = [git, "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    return result.stdout.strip("\n")
