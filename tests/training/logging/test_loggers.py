import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqd_scale.training.config import LogConfig, WandbConfig
from vqd_scale.training.logging import loggers
from vqd_scale.training.logging.loggers import AsyncLogger, TensorBoardWriter, WandbWriter
from vqd_scale.training.logging.metrics import MetricLogger, MetricsFile, read_metrics

ROWS = [{"images": 8, "loss": 2.5}, {"images": 3_000_000_000, "loss": 0.25, "rate": 1e-4}]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard reads them."""
    events: Any = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_each_row_once_it_is_written(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, 0)
    for count, row in enumerate(ROWS, start=1):
        writer.write(row)
        assert len(scalars(tmp_path)["loss"]) == count
    writer.close()
    assert scalars(tmp_path) == {
        "loss": [(8, 2.5), (3_000_000_000, 0.25)],
        "rate": [(3_000_000_000, pytest.approx(1e-4))],
    }


def test_tensorboard_drops_points_after_the_resumed_checkpoint(tmp_path: Path) -> None:
    starts = ((0, {8: 4.0, 16: 3.0, 24: 2.0, 32: 1.0}), (16, {24: 2.5, 32: 2.0}), (16, {24: 2.5}))
    for start, losses in starts:
        metric_logger = MetricLogger(LogConfig(tensorboard=True), tmp_path, start, {})
        for images, loss in losses.items():
            metric_logger.write({"images": images, "loss": loss})
        metric_logger.close()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(8, 4.0), (16, 3.0), (24, 2.5)]}


def test_tensorboard_is_imported_only_by_its_writer() -> None:
    source = "import sys, vqd_scale.training.logging.metrics; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


class Recorder:
    """Stub of the wandb package."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, float]] = []
        self.finished = 0

    def init(self, **named: Any) -> "Recorder":
        self.started.append(named)
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.logged.append((step, row["loss"]))

    def finish(self) -> None:
        self.finished += 1

    def Settings(self, **named: Any) -> SimpleNamespace:
        return SimpleNamespace(**named)


def test_wandb_resumes_under_the_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    for row in ROWS:
        metric_logger = MetricLogger(LogConfig(wandb=WandbConfig(entity="us")), tmp_path, 0, {"seed": 3})
        metric_logger.write(row)
        metric_logger.close()
    first, second = recorder.started
    assert first["id"] == second["id"]
    assert (first["resume"], first["mode"], first["entity"]) == ("allow", "offline", "us")
    assert first["config"] == {"seed": 3}
    assert recorder.logged == [(8, 2.5), (3_000_000_000, 0.25)]
    assert recorder.finished == 2


def test_disabled_wandb_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    metric_logger = MetricLogger(LogConfig(wandb=WandbConfig(mode="disabled")), tmp_path, 0, {})
    metric_logger.write(ROWS[0])
    metric_logger.close()


@pytest.mark.parametrize("place", ["import", "init", "log", "finish"])
def test_failing_logger_warns_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()

    def fail(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no\nnetwork")

    if place != "import":
        setattr(recorder, place, fail)
    monkeypatch.setitem(sys.modules, "wandb", None if place == "import" else recorder)
    with caplog.at_level(logging.WARNING):
        metric_logger = MetricLogger(LogConfig(wandb=WandbConfig()), tmp_path, 0, {})
        for row in ROWS:
            metric_logger.write(row)
        metric_logger.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("wandb failed (")
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.5, 0.25]


def test_blocked_logger_does_not_stall_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(loggers, "_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(loggers, "_MAX_QUEUED_ROWS", 3)

    def hang() -> WandbWriter:
        forever.wait()
        raise AssertionError

    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        writer = AsyncLogger("wandb", hang)
        for _ in range(10):
            writer.write(ROWS[0])
        writer.close()
        assert len(caplog.records) == 1
    assert not forever.is_set()
    assert time.monotonic() - began < 60
    forever.set()


def test_real_wandb_offline_leaves_one_folder_with_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts, the second from an earlier checkpoint."""
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for start, losses in ((0, {8: 4.0, 16: 3.0, 24: 2.0}), (16, {24: 2.5, 32: 1.0})):
        metrics = MetricsFile(tmp_path / "metrics.jsonl", start)
        writer = WandbWriter(WandbConfig(), tmp_path, {"seed": 3}, read_metrics(metrics.path))
        for images, loss in losses.items():
            for each in (metrics, writer):
                each.write({"images": images, "loss": loss})
        writer.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # Records of protobuf: a name, and its value as JSON.
    values = re.findall(rb"loss\x82\x01.([0-9.]+)", file.read_bytes())
    assert list(dict.fromkeys(map(float, values))) == [4.0, 3.0, 2.5, 1.0]
    assert len(list((tmp_path / "wandb").glob("replaced-offline-run-*"))) == 1
