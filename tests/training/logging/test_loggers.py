import logging
import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from vqd_scale.training.logging import loggers as writers
from vqd_scale.training.logging.loggers import AsyncLogger, TensorBoardWriter, WandbConfig, WandbWriter
from vqd_scale.training.logging.metrics import LogConfig, MetricLogger, read_metrics

ROWS = [{"images": 8, "loss": 2.5}, {"images": 3_000_000_000, "loss": 0.25, "rate": 1e-4}]


def event_type() -> Any:
    """TensorBoard's event, of its published field numbers."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="test")
    kinds = descriptor_pb2.FieldDescriptorProto
    value = file.message_type.add(name="Value")
    value.field.add(name="tag", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    value.field.add(name="simple_value", number=2, type=kinds.TYPE_FLOAT, label=kinds.LABEL_OPTIONAL)
    summary = file.message_type.add(name="Summary")
    summary.field.add(
        name="value",
        number=1,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_REPEATED,
        type_name=".test.Value",
    )
    event = file.message_type.add(name="Event")
    event.field.add(name="wall_time", number=1, type=kinds.TYPE_DOUBLE, label=kinds.LABEL_OPTIONAL)
    event.field.add(name="step", number=2, type=kinds.TYPE_INT64, label=kinds.LABEL_OPTIONAL)
    event.field.add(name="file_version", number=3, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    event.field.add(
        name="summary",
        number=5,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".test.Summary",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Event"))


def test_event_files_are_what_protocol_buffers_read(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for row in ROWS:
        writer.write(row)
    writer.close()
    (path,) = tmp_path.iterdir()
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_type().FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events[1:]] == [8, 3_000_000_000]
    found = [{value.tag: value.simple_value for value in event.summary.value} for event in events[1:]]
    assert found[0] == {"loss": 2.5}
    assert found[1] == pytest.approx({"loss": 0.25, "rate": 1e-4})


def test_the_checksum_is_crc_32c() -> None:
    # 0xE3069283 is the check value of CRC-32C for these nine digits.
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert writers._checksum(b"123456789") == struct.pack("<I", masked)  # pyright: ignore[reportPrivateUsage]


class Recorder:
    """Stands for the wandb package."""

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


def test_wandb_goes_on_under_the_identity_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    for row in ROWS:
        diary = MetricLogger(LogConfig(wandb=WandbConfig(entity="us")), tmp_path, 0, {"seed": 3})
        diary.write(row)
        diary.close()
    first, second = recorder.started
    assert first["id"] == second["id"]
    assert (first["resume"], first["mode"], first["entity"]) == ("allow", "offline", "us")
    assert first["config"] == {"seed": 3}
    assert recorder.logged == [(8, 2.5), (3_000_000_000, 0.25)]
    assert recorder.finished == 2


def test_disabled_wandb_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    diary = MetricLogger(LogConfig(wandb=WandbConfig(mode="disabled")), tmp_path, 0, {})
    diary.write(ROWS[0])
    diary.close()


@pytest.mark.parametrize("place", ["import", "init", "log", "finish"])
def test_a_writer_that_fails_is_one_warning(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()

    def fail(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no\nnetwork")

    if place != "import":
        setattr(recorder, place, fail)
    monkeypatch.setitem(sys.modules, "wandb", None if place == "import" else recorder)
    with caplog.at_level(logging.WARNING):
        diary = MetricLogger(LogConfig(wandb=WandbConfig()), tmp_path, 0, {})
        for row in ROWS:
            diary.write(row)
        diary.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("wandb failed (")
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.5, 0.25]


def test_a_writer_that_never_returns_stalls_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(writers, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(writers, "_WAITING_ROWS", 3)

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


def test_real_wandb_offline_writes_into_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    writer = WandbWriter(WandbConfig(), tmp_path, {"seed": 3})
    writer.write(ROWS[0])
    writer.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
