import pytest

from vqd_scale.commands.benchmarks.step import StepProblem, benchmark_step, step_of

SMALL = StepProblem(width=32, layers=2, heads=4, side=6, codes=20, batch=2)


def test_both_sides_take_the_same_steps() -> None:
    ours, alternative = step_of("ours", SMALL), step_of("alternative", SMALL)
    expected = [alternative() for _ in range(4)]
    assert [ours() for _ in range(4)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.long
def test_the_result_holds_what_is_promised() -> None:
    result = benchmark_step(1, SMALL)
    assert {"ours", "alternative", "ratio", "ratio_bf16", "memory_ratio"} <= result.keys()
