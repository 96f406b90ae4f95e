import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.loss import (
    LossProblem,
    benchmark_loss,
    closed_form_loss,
    compared_losses,
    log_one_hot_loss,
)
from benchmarks.main import main
from torch import Tensor


@pytest.mark.parametrize("first_time", [0, 1, 97])
def test_losses_and_gradients_of_both_sides_agree(first_time: int) -> None:
    problem = LossProblem(batch=3, length=40, codes=30)
    *inputs, _ = problem.tensors()
    t = torch.tensor([first_time, 50, 99])
    sides = [side(problem)(*inputs, t) for side in (closed_form_loss, log_one_hot_loss)]
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, inputs[:2]) for loss in sides]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)


def test_differing_losses_stop_the_benchmark() -> None:
    problem = LossProblem(batch=2, length=8, codes=6)
    tensors = problem.tensors()
    same = {"ours": closed_form_loss, "alternative": log_one_hot_loss}
    losses = compared_losses(same, problem, tensors)
    assert losses["ours"] == pytest.approx(losses["alternative"], rel=1e-4)

    def shifted(problem: LossProblem) -> Callable[..., Tensor]:
        return lambda *arguments: closed_form_loss(problem)(*arguments) + 1e-2

    def steeper(problem: LossProblem) -> Callable[..., Tensor]:
        def loss(hidden: Tensor, *arguments: Tensor) -> Tensor:
            zero = (hidden - hidden.detach()).sum()
            return closed_form_loss(problem)(hidden, *arguments) + 1e-2 * zero

        return loss

    for wrong in (shifted, steeper):
        with pytest.raises(AssertionError, match="not close"):
            compared_losses({"ours": closed_form_loss, "alternative": wrong}, problem, tensors)


@pytest.mark.long
def test_result_records_measurement_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_loss = partial(benchmark_loss, problem=LossProblem(2, 256, 500))
    monkeypatch.setattr("benchmarks.loss.benchmark_loss", small_loss)
    main(["loss", "--output", str(tmp_path / "loss.json"), "--rounds", "1"])
    result = json.loads((tmp_path / "loss.json").read_text())
    assert {"ours", "alternative", "ratio", "memory_ratio", "machine", "versions", "commit"} <= set(result)
    assert result["ratio"] == pytest.approx(result["alternative"] / result["ours"])
    assert 0 < result["memory_ratio"] < 1
    assert [len(seconds) for seconds in result["seconds"].values()] == [1, 1]
    assert result["losses"]["ours"] == pytest.approx(result["losses"]["alternative"], rel=1e-4)


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["speed"])
    assert end.value.code == 2
    assert "loss" in capsys.readouterr().err
