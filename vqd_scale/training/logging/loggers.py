"""Metric writers for TensorBoard and Weights & Biases; a failing writer cannot stall or end a run."""

import logging
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vqd_scale.core.atomic_io import publish_text
from vqd_scale.training.config import WandbConfig

logger = logging.getLogger(__name__)

_MAX_QUEUED_ROWS = 1000
_TIMEOUT_SECONDS = 10.0

Row = Mapping[str, float]


class Writer(Protocol):
    """Destination of metric rows."""

    def write(self, row: Row) -> None:
        """Write a row; its ``images`` value is the step."""
        ...

    def close(self) -> None:
        """Flush and close the writer."""
        ...


class AsyncLogger:
    """Writer in a thread with a bounded queue; an exception or hang in it does not affect the run.

    Args:
        name: Name for warnings.
        start: Factory of the writer, called in the thread.
    """

    def __init__(self, name: str, start: Callable[[], Writer]) -> None:
        self.name = name
        self._rows: queue.Queue[Row | None] = queue.Queue(_MAX_QUEUED_ROWS)
        self._warned = False
        self._thread = threading.Thread(target=self._write_queued_rows, args=(start,), name=name, daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Enqueue a row; it is dropped if the queue is full."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._warn("is too slow, and rows are dropped")

    def close(self) -> None:
        """Wait for the writer to finish, up to a timeout."""
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            self._warn(f"did not close within {_TIMEOUT_SECONDS:g} s")

    def _write_queued_rows(self, start: Callable[[], Writer]) -> None:
        # A failure of an external service must not end a run.
        try:
            writer = start()
            while (row := self._rows.get()) is not None:
                writer.write(row)
            writer.close()
        except Exception as error:  # noqa: BLE001
            self._warn(f"failed ({' '.join(str(error).split())[:200]})")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s %s. Training continues; metrics.jsonl has every row.", self.name, problem)


class WandbWriter:
    """Weights & Biases writer, resumed under the run ID stored in the run folder.

    W&B cannot resume an offline run: each start writes a folder of its own. So every start writes all rows,
    and the folders of earlier starts are renamed, so that ``wandb sync`` finds one folder.

    Args:
        config: Project, mode and names.
        run: Run folder.
        settings: Full configuration of the run.
        rows: Rows of earlier starts.
    """

    def __init__(
        self, config: WandbConfig, run: Path, settings: Mapping[str, Any], rows: Sequence[Row] = ()
    ) -> None:
        import wandb

        id_file = run / "wandb-id.txt"
        if not id_file.exists():
            publish_text(id_file, uuid.uuid4().hex[:8])
        identity = id_file.read_text(encoding="utf-8").strip()
        if config.mode == "offline":
            for earlier in (run / "wandb").glob(f"offline-run-*-{identity}"):
                earlier.rename(earlier.with_name(f"replaced-{earlier.name}"))
        self._run = wandb.init(
            id=identity,
            resume="allow",
            project=config.project,
            entity=config.entity,
            name=config.name or run.name,
            mode=config.mode,
            dir=str(run),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        for row in rows if config.mode == "offline" else ():
            self.write(row)

    def write(self, row: Row) -> None:
        """Log a row with its number of images as the step."""
        self._run.log(dict(row), step=int(row["images"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class TensorBoardWriter:
    """Writer of TensorBoard event files, one per start of the run.

    Args:
        folder: Folder of the event files.
        images: Images seen at the start or resume. TensorBoard hides the points of earlier starts after it.
    """

    def __init__(self, folder: Path, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=images + 1)

    def write(self, row: Row) -> None:
        """Append a row and flush it, so that a kill loses no row."""
        for name, value in row.items():
            if name != "images":
                self._writer.add_scalar(name, value, int(row["images"]))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
