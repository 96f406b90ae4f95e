"""Metric log of a run: ``metrics.jsonl``, one JSON object per line, and optional further writers."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vqd_scale.core.atomic_io import publish_text, set_aside, writing
from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import parse_json
from vqd_scale.training.config import LogConfig
from vqd_scale.training.logging.loggers import AsyncLogger, TensorBoardWriter, WandbWriter, Writer

logger = logging.getLogger(__name__)

_ROW: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, int | float])


class MetricsFile:
    """Writer of ``metrics.jsonl``; a resumed run first deletes the rows after its checkpoint.

    Args:
        path: Path of the file.
        images: Images seen at the start or resume.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path = path
        rows = read_metrics(path)
        damaged = path.read_bytes().count(b"\n") - len(rows) if path.exists() else 0
        if damaged:
            original = set_aside(path).name
            logger.warning("%s: %d damaged lines are left out; see '%s'.", path, damaged, original)
        rows = [row for row in rows if row["images"] <= images]
        publish_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._pending: list[str] = []

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; if the disk is full, log a warning and retry with the next row."""
        self._pending.append(json.dumps(row) + "\n")
        size = self.path.stat().st_size
        try:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
        except UserError as error:
            os.truncate(self.path, size)
            logger.warning("%s Training continues; %d rows are pending.", error, len(self._pending))
        else:
            self._pending = []

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
            folder = run / "tensorboard"
            self._writers.append(AsyncLogger("TensorBoard", lambda: TensorBoardWriter(folder, images)))
        if config.wandb is not None and config.wandb.mode != "disabled":
            wandb, rows = config.wandb, read_metrics(run / "metrics.jsonl")
            self._writers.append(AsyncLogger("wandb", lambda: WandbWriter(wandb, run, settings, rows)))

    def write(self, row: Mapping[str, float]) -> None:
        """Write a row to all writers."""
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read all valid rows of a metrics file; empty if there is no file.

    A last row truncated by a kill is ignored, as are damaged lines.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(_parsed, lines) if row is not None]


def _parsed(line: bytes) -> dict[str, float] | None:
    """Return the row of a line, or ``None`` if it is no JSON object of numbers."""
    try:
        row = parse_json(line, _ROW)
    except ValueError:
        return None
    return row if "images" in row else None
