"""The Triton kernels without a GPU, in a separate process with Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_interpreted_kernels_pass_gpu_and_objective_tests() -> None:
    """Run the objective's and the GPU's tests on the interpreted kernels."""
    pytest.importorskip("triton")
    chosen = (
        "test_kernels or bound_and_gradient_equal or float32_bound or decoder_term_is or low_precision"
        " or backward_dtypes or head_form or retained or extreme or improbable"
    )
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
