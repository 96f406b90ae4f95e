from benchmarks.autoregression import AutoregressionProblem, benchmark_autoregression


def test_all_methods_are_measured_at_every_grid() -> None:
    problem = AutoregressionProblem(width=16, layers=1, heads=2, codes=9, sides=(3, 4), steps=(2, 5), batch=2)
    figures = benchmark_autoregression(1, problem)
    ways = {"diffusion_2", "diffusion_5", "ar_kept", "ar_again"}
    assert {grid: set(row) for grid, row in figures["images_per_second"].items()} == {
        "3x3": ways,
        "4x4": ways,
    }
    cached_rate, fast = (figures["images_per_second"]["4x4"][name] for name in ("ar_kept", "diffusion_2"))
    assert figures["ratio"] == figures["times_faster_than_ar_kept"]["4x4"]["diffusion_2"]
    assert abs(figures["ratio"] * cached_rate / fast - 1) < 1e-6
    assert figures["alternative"] > 0 < figures["memory_ratio"] or figures["memory_ratio"] == 0
