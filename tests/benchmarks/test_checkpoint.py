from benchmarks.checkpoint import benchmark_checkpoint
from benchmarks.step import StepProblem


def test_result_fields() -> None:
    result = benchmark_checkpoint(1, StepProblem(width=32, layers=1, heads=4, side=6, codes=20, batch=2))
    assert {"ours", "alternative", "ratio", "share_of_synchronous", "megabytes"} <= result.keys()
    assert result["megabytes"] > 0
