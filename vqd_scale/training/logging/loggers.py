"""Metric writers for TensorBoard and Weights & Biases; a failing writer cannot stall or end a run."""

import logging
import queue
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from vqd_scale.core.atomic_io import publish_text
from vqd_scale.core.config import Config

logger = logging.getLogger(__name__)

_WAITING_ROWS = 1000
_PATIENCE_SECONDS = 10.0

Row = Mapping[str, float]


class WandbConfig(Config):
    """Weights & Biases logging."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """W&B mode. ``offline`` writes to the run folder for a later ``wandb sync``, because compute nodes often
    have no internet access."""
    project: str = "vqd-scale"
    entity: str | None = None
    name: str | None = None
    """Name of the W&B run; defaults to the name of the run folder."""


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
        self._rows: queue.Queue[Row | None] = queue.Queue(_WAITING_ROWS)
        self._warned = False
        self._thread = threading.Thread(target=self._serve, args=(start,), name=name, daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Enqueue a row; it is dropped if the queue is full."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._warn("does not take its rows")

    def close(self) -> None:
        """Wait for the writer to finish, up to a timeout."""
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._warn("does not end")

    def _serve(self, start: Callable[[], Writer]) -> None:
        # A failure of an external service must not end a run.
        try:
            writer = start()
            while (row := self._rows.get()) is not None:
                writer.write(row)
            writer.close()
        except Exception as error:  # noqa: BLE001
            self._warn(f"failed ({' '.join(str(error).split())[:200]})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s %s; the run goes on, and metrics.jsonl has every row.", self.name, what)


class WandbWriter:
    """Weights & Biases writer, resumed under the run ID stored in the run folder.

    Args:
        config: Project, mode and names.
        run: Run folder.
        settings: Full configuration of the run.
    """

    def __init__(self, config: WandbConfig, run: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        identity = run / "wandb-id.txt"
        if not identity.exists():
            publish_text(identity, uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            project=config.project,
            entity=config.entity,
            name=config.name or run.name,
            mode=config.mode,
            dir=str(run),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, row: Row) -> None:
        """Log a row with its number of images as the step."""
        self._run.log(dict(row), step=int(row["images"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class TensorBoardWriter:
    """Writer of TensorBoard event files with scalars, without dependencies.

    An event file is a sequence of records (length, checksum, bytes, checksum), each a small protocol buffer.

    Args:
        folder: Folder of the event files, one file per start of the run.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns() // 1000}.vqd-scale"
        self._file = path.open("ab")
        self._record(_string(3, b"brain.Event:2"))

    def write(self, row: Row) -> None:
        """Append a row."""
        values = b"".join(
            _string(1, _string(1, name.encode()) + _key(2, 5) + struct.pack("<f", value))
            for name, value in row.items()
            if name != "images"
        )
        self._record(_key(2, 0) + _varint(int(row["images"])) + _string(5, values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _record(self, event: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _string(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _crc32c_table() -> list[int]:
    table: list[int] = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc32c_table()


def _checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C of the record format: rotated and offset."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    masked = (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8
    return struct.pack("<I", masked & 0xFFFFFFFF)
