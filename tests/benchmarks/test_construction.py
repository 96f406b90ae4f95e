import pytest
from benchmarks.construction import benchmark_construction


@pytest.mark.long
def test_a_rank_of_sixteen_needs_less_memory_than_one_that_holds_the_whole() -> None:
    found = benchmark_construction(1, compared="S", held="S", precision="fp32")
    assert found["memory_ratio"] < 0.6
    cut, whole = found["S_cut"], found["S_whole"]
    assert cut["peak_megabytes"] >= cut["held_megabytes"] * 0.95
    assert whole["held_megabytes"] > 35_936_647 * 4 / 1e6
