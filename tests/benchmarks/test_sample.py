from pathlib import Path

import pytest
from benchmarks import sample
from benchmarks.sample import SampleProblem, benchmark_sample, equal_tokens

SMALL = SampleProblem(width=64, layers=1, side=6, codes=40, steps=3)


def test_diffusers_steps_are_reproduced(tmp_path: Path) -> None:
    SMALL.write(tmp_path / "pipeline")
    assert equal_tokens(tmp_path / "pipeline", SMALL) == 1.0


def test_differing_tokens_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(folder: Path, problem: SampleProblem) -> float:
        del folder, problem
        return 0.5

    monkeypatch.setattr(sample, "equal_tokens", half)
    with pytest.raises(RuntimeError, match=r"only 50.00% of the sampled tokens"):
        benchmark_sample(1, SMALL)


@pytest.mark.long
def test_result_fields() -> None:
    result = benchmark_sample(1, SMALL)
    assert result["ratio"] == pytest.approx(result["alternative"] / result["ours"])
    assert result["ratio_bf16"] == pytest.approx(result["alternative"] / result["ours_bf16"])
    assert result["memory_ratio"] > 0
    assert result["equal_tokens"] == 1.0
    assert result["steps"] == 3
