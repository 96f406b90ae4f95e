import pytest
from benchmarks.step import LAYER_OF_B, StepProblem, benchmark_step, step_of

from vqd_scale.nn.config import DenoiserConfig
from vqd_scale.nn.sizes import SIZES

SMALL = StepProblem(width=32, layers=2, heads=4, side=6, codes=20, batch=2)


def test_both_sides_take_equal_steps() -> None:
    package_step, alternative_step = step_of("ours", SMALL), step_of("alternative", SMALL)
    expected = [alternative_step() for _ in range(4)]
    assert [package_step() for _ in range(4)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.long
def test_result_fields() -> None:
    result = benchmark_step(1, SMALL)
    assert {"ours", "alternative", "ratio", "ratio_bf16", "memory_ratio"} <= result.keys()


def test_layer_benchmark_uses_size_b() -> None:
    # Default width and heads are those of size B.
    size, shape = SIZES["B"], DenoiserConfig()
    assert (LAYER_OF_B.width, LAYER_OF_B.heads, LAYER_OF_B.codes) == (shape.width, shape.heads, size.codes)
    assert (LAYER_OF_B.side, LAYER_OF_B.side) == size.grid
    assert not size.shape
