import pytest
from benchmarks.construction import benchmark_construction


@pytest.mark.long
def test_sharded_construction_needs_less_memory() -> None:
    figures = benchmark_construction(1, compared="S", measured="S", precision="fp32")
    assert figures["memory_ratio"] < 0.6
    cut, unsharded = figures["S_cut"], figures["S_whole"]
    assert cut["peak_megabytes"] >= cut["held_megabytes"] * 0.95
    assert unsharded["held_megabytes"] > 35_936_647 * 4 / 1e6
