"""Machine figures in a row of metrics."""

import threading
from pathlib import Path

import pytest
import torch

from tests.training.rank_threads import on_ranks
from vqd_scale.core.config import load_config
from vqd_scale.core.world import World
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.flops import cost_of
from vqd_scale.training.logging import aggregator as module
from vqd_scale.training.logging.aggregator import MetricAggregator
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask


class SingleRankWorld(World):
    """Destroy the process group of a single rank after the test."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def config(token_world: Path, tmp_path: Path) -> TrainConfig:
    return load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])


@pytest.mark.parametrize("ideal_seconds", [None, 0.01])
def test_model_flops_utilization_requires_known_peak(
    config: TrainConfig, ideal_seconds: float | None
) -> None:
    config.run.mkdir(exist_ok=True)
    metrics = MetricAggregator(config, SingleRankWorld(0, 1, torch.device("cpu")), 0, ideal_seconds)
    metrics.add_losses(torch.tensor(16.0), {})
    metrics.add_step(8.0, 1e-3)
    assert metrics.write(8, {}) == 2.0
    metrics.close()
    (row,) = read_metrics(config.run / "metrics.jsonl")
    if ideal_seconds is None:
        assert "model_flops_utilization" not in row
    else:
        assert row["model_flops_utilization"] == pytest.approx(row["images_per_second"] * ideal_seconds)
    assert row["peak_memory_gigabytes"] > 0


def test_task_reports_flops_of_its_network(config: TrainConfig) -> None:
    task = DenoisingTask(config, SingleRankWorld(0, 1, torch.device("cpu")))
    network = task.model.network
    assert isinstance(network, Denoiser)
    inputs = torch.zeros(1, 9).long(), torch.zeros(1).long(), torch.zeros(1, 8, 16)
    assert task.forward_flops == 2 * cost_of(network, *inputs).multiply_accumulates


def test_straggler_is_named_at_equal_step_times(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    thread_times = threading.local()
    monkeypatch.setattr(module, "_benchmark_seconds", lambda device: thread_times.seconds)  # pyright: ignore[reportUnknownLambdaType]

    def run(world: World) -> None:
        thread_times.seconds = 0.03 if world.rank == 1 else 0.01
        metrics = MetricAggregator(config, world, 0)
        metrics.add_losses(torch.tensor(4.0), {})
        metrics.add_step(6.0, 1e-3)
        metrics.write(8, {})
        metrics.close()

    config.run.mkdir(exist_ok=True)
    on_ranks(3, run)
    (row,) = read_metrics(config.run / "metrics.jsonl")
    assert (row["slowest_rank"], row["slowest_rank_slowness"]) == (1, pytest.approx(3.0))
    assert row["loss"] == pytest.approx(2.0)
