"""Metric log of a run: ``metrics.jsonl``, one JSON object per line, and optional further writers."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from vqd_scale.core.atomic_io import publish_text, writing
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.training.logging.loggers import (
    AsyncLogger,
    TensorBoardWriter,
    WandbConfig,
    WandbWriter,
    Writer,
)

logger = logging.getLogger(__name__)


class LogConfig(Config):
    """Metric logging; ``metrics.jsonl`` is always written."""

    every_images: PositiveInt = 10_000
    """Images between two log rows."""
    tensorboard: bool = False
    """Write TensorBoard event files to the subfolder ``tensorboard`` of the run folder."""
    wandb: WandbConfig | None = None
    """Weights & Biases logging; disabled if not given."""


class MetricsFile:
    """Writer of ``metrics.jsonl``; a resumed run first deletes the rows after its checkpoint.

    Args:
        path: Path of the file.
        images: Images seen at the start or resume.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["images"] <= images]
        publish_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._waiting: list[str] = []

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; if the disk is full, log a warning and retry with the next row."""
        self._waiting.append(json.dumps(row) + "\n")
        size = self.path.stat().st_size
        try:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._waiting))
        except UserError as error:
            os.truncate(self.path, size)
            logger.warning("%s Training goes on; %d rows wait to be written.", error, len(self._waiting))
        else:
            self._waiting = []

    def close(self) -> None:
        """Do nothing: the file is not kept open."""


class MetricLogger:
    """All metric writers of a run.

    Args:
        config: Enabled writers.
        run: Run folder.
        images: Images seen at the start or resume.
        settings: Full configuration of the run, as plain values.
    """

    def __init__(self, config: LogConfig, run: Path, images: int, settings: Mapping[str, Any]) -> None:
        self._writers: list[Writer] = [MetricsFile(run / "metrics.jsonl", images)]
        if config.tensorboard:
            self._writers.append(AsyncLogger("TensorBoard", lambda: TensorBoardWriter(run / "tensorboard")))
        if config.wandb is not None and config.wandb.mode != "disabled":
            wandb = config.wandb
            self._writers.append(AsyncLogger("wandb", lambda: WandbWriter(wandb, run, settings)))

    def write(self, row: Mapping[str, float]) -> None:
        """Write a row to all writers."""
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read all complete rows of a metrics file; empty if there is no file.

    A last row truncated by a kill is ignored.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
