"""The Triton kernels without a GPU: in a process of its own, where Triton interprets them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_kernels_pass_the_tests_of_a_gpu_and_those_of_the_objective() -> None:
    """The dense matrices are the oracle of both implementations: here the kernels take the same tests."""
    pytest.importorskip("triton")
    chosen = "test_kernels or trap_5 or trap_31 or head_form or retained or extreme or hopeless"
    files = ["tests/gpu/test_kernels.py", "tests/diffusion/test_objective.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-k", chosen, *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) >= 30
    assert "skipped" not in result.stdout
