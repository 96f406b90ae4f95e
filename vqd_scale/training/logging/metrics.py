"""The run's diary: one JSON object a line, images seen first; other writers follow it."""

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
    """What is written down while a run goes on; metrics.jsonl always is."""

    every_images: PositiveInt = 10_000
    """Images between two rows."""
    tensorboard: bool = False
    """Event files as well, in the run's folder ``tensorboard``."""
    wandb: WandbConfig | None = None
    """Weights & Biases as well."""


class MetricsFile:
    """Append rows to ``metrics.jsonl``; a resumed run first takes out what it is about to write again.

    Args:
        path: The file.
        images: Where the run starts or goes on from.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["images"] <= images]
        publish_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._waiting: list[str] = []

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; on a full disk it waits for the next one, with a warning."""
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
        """Nothing is held open."""


class MetricLogger:
    """All writers of a run.

    Args:
        config: Which there are.
        run: The run's folder.
        images: Where the run starts or goes on from.
        settings: The run's whole configuration, as plain values.
    """

    def __init__(self, config: LogConfig, run: Path, images: int, settings: Mapping[str, Any]) -> None:
        self._writers: list[Writer] = [MetricsFile(run / "metrics.jsonl", images)]
        if config.tensorboard:
            self._writers.append(AsyncLogger("TensorBoard", lambda: TensorBoardWriter(run / "tensorboard")))
        if config.wandb is not None and config.wandb.mode != "disabled":
            wandb = config.wandb
            self._writers.append(AsyncLogger("wandb", lambda: WandbWriter(wandb, run, settings)))

    def write(self, row: Mapping[str, float]) -> None:
        """Give a row to all writers."""
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        """Let all writers finish."""
        for writer in self._writers:
            writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows of a metrics file; none if there is no file. A row that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
