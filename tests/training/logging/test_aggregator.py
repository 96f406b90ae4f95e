"""What a row of metrics says of the machine."""

import threading
from pathlib import Path

import pytest
import torch

from tests.training.ranks import on_ranks
from vqd_scale.core.config import load_config
from vqd_scale.core.world import World
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.flops import cost_of
from vqd_scale.training.logging import aggregator as module
from vqd_scale.training.logging.aggregator import MetricAggregator
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.tasks.denoising import DenoisingTask, TrainConfig


class Alone(World):
    """One process that talks to nobody."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def config(token_world: Path, tmp_path: Path) -> TrainConfig:
    return load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])


@pytest.mark.parametrize("ideal_seconds", [None, 0.01])
def test_the_share_of_the_peak_is_told_where_the_peak_is_known(
    config: TrainConfig, ideal_seconds: float | None
) -> None:
    config.run.mkdir(exist_ok=True)
    report = MetricAggregator(config, Alone(0, 1, torch.device("cpu")), 0, ideal_seconds)
    report.add(torch.tensor(16.0), {})
    report.add_step(torch.tensor(8), 1e-3)
    assert report.write(8, {}) == 2.0
    report.close()
    (row,) = read_metrics(config.run / "metrics.jsonl")
    if ideal_seconds is None:
        assert "model_flops_utilisation" not in row
    else:
        assert row["model_flops_utilisation"] == pytest.approx(row["images_per_second"] * ideal_seconds)
    assert row["peak_memory_gigabytes"] > 0


def test_a_task_knows_what_its_network_takes(config: TrainConfig) -> None:
    task = DenoisingTask(config, Alone(0, 1, torch.device("cpu")))
    network = task.module.model.denoiser
    assert isinstance(network, Denoiser)
    inputs = torch.zeros(1, 9).long(), torch.zeros(1).long(), torch.zeros(1, 8, 16)
    assert task.forward_flops == 2 * cost_of(network, *inputs).multiply_accumulates


def test_the_slowest_rank_is_named_though_steps_last_equally_long_on_all(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = threading.local()
    monkeypatch.setattr(module, "_alone", lambda device: own.seconds)  # pyright: ignore[reportUnknownLambdaType]

    def run(world: World) -> None:
        own.seconds = 0.03 if world.rank == 1 else 0.01
        report = MetricAggregator(config, world, 0)
        report.add(torch.tensor(4.0), {})
        report.add_step(torch.tensor(6), 1e-3)
        report.write(8, {})
        report.close()

    config.run.mkdir(exist_ok=True)
    on_ranks(3, run)
    (row,) = read_metrics(config.run / "metrics.jsonl")
    assert (row["slowest_rank"], row["slowest_rank_slowness"]) == (1, pytest.approx(3.0))
    assert row["loss"] == pytest.approx(2.0)
