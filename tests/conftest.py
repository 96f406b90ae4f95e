from collections.abc import Callable

import pytest
from hypothesis import settings

# A first example often pays for an import or a busy machine: no test here asserts how long anything takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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
"""Why the tests of a marker cannot run on this machine; none where they can."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop where a selected test cannot run: whoever selects a marker wants an answer, not a skipped test."""
    selected = {marker.name for item in session.items for marker in item.iter_markers()}
    reasons = [reason for name, find in MISSING.items() if name in selected and (reason := find())]
    if reasons:
        pytest.exit("; ".join(reasons) + ".", returncode=2)
