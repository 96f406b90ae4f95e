import signal
import sys
from collections.abc import Callable, Generator

import pytest
from hypothesis import settings

from vqd_scale.core.signals import STOP_SIGNALS

# The first example may include an import or wait for a busy machine, and no test asserts a duration.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _restored_signal_handlers() -> Generator[None]:
    """Restore the signal handlers after each test, since a `StopFlag` replaces them for good."""
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _left_process_group() -> Generator[None]:
    """Destroy the process group after each test, or a later `UserError` would pass for another rank's."""
    yield
    if "torch.distributed" in sys.modules:
        from vqd_scale.core.world import leave_world

        leave_world()


def _missing_ceph() -> str | None:
    from tests.s3.ceph import PACKAGES, missing_programs

    programs = ", ".join(missing_programs())
    return f"Ceph is not installed ({programs}): as root, apt-get install {PACKAGES}" if programs else None


def _missing_slurm() -> str | None:
    from tests.slurm.cluster import missing

    return missing()


def _missing_gpu() -> str | None:
    import torch

    from vqd_scale.diffusion.kernels.dispatch import is_interpreted

    if torch.cuda.is_available() or is_interpreted():
        return None
    return (
        "torch finds no CUDA device: run this on a machine with a GPU and its driver (docs/installation.md)"
    )


MISSING: dict[str, Callable[[], str | None]] = {
    "s3": _missing_ceph,
    "slurm": _missing_slurm,
    "gpu": _missing_gpu,
}
"""Functions that return why the tests of a marker cannot run on this machine, or ``None``."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop if a selected test cannot run on this machine: a skipped test would pass for a result."""
    selected = {marker.name for item in session.items for marker in item.iter_markers()}
    reasons = [reason for name, find in MISSING.items() if name in selected and (reason := find())]
    if reasons:
        pytest.exit("; ".join(reasons) + ".", returncode=2)
