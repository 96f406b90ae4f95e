import json
import logging
from collections.abc import Iterable
from typing import Literal

from pydantic import TypeAdapter

from vqd_scale.core.atomic_io import Location, publish_text, reading, set_aside, writing
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.safe_json import parse_json

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
"""File name of the report of bad samples of a dataset."""

_LINE = TypeAdapter(dict[Literal["shard", "key", "reason"], str])
"""Shape of a line."""

DUPLICATES = "near_duplicates.jsonl"
"""File name of the report of samples skipped as near-duplicates of excluded images."""


class Quarantine:
    """Report of bad samples: one JSON line with shard, key and reason per sample.

    A sample that occurs again, in a later epoch or after a restart, is reported once. Damaged lines of an
    earlier start are left out with a warning, and their file is kept.

    Raises:
        UserError: The report cannot be written.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        with reading(path):
            content = path.read_bytes() if path.exists() else b""
        # A kill may have left a partial line; remove it before lines are appended.
        *lines, partial = content.split(b"\n")
        self._lines = dict.fromkeys(line.decode() for line in lines if _is_valid(line))
        damaged = sum(not _is_valid(line) for line in lines)
        if damaged:
            original = path if isinstance(path, S3Path) else set_aside(path)
            logger.warning("%s: %d damaged lines are left out; see '%s'.", path, damaged, original.name)
        if damaged or partial:
            publish_text(path, "".join(f"{line}\n" for line in self._lines))

    def __len__(self) -> int:
        return len(self._lines)

    def extend(self, samples: Iterable[tuple[str, str, str]]) -> None:
        """Report samples, each as (shard, key, reason).

        Raises:
            UserError: The report cannot be written.
        """
        lines = _lines(samples)
        new = [line for line in dict.fromkeys(lines) if line not in self._lines]
        self._lines |= dict.fromkeys(new)
        if not new:
            return
        if isinstance(self.path, S3Path):
            # S3 objects cannot be appended to.
            publish_text(self.path, "".join(f"{line}\n" for line in self._lines))
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in new)


def publish_report(path: Location, samples: Iterable[tuple[str, str, str]]) -> None:
    """Write a report by atomic rename, replacing an existing one; safe for concurrent processes.

    Args:
        path: Path of the report; not written if there is no sample.
        samples: Samples to report, each as (shard, key, reason).

    Raises:
        UserError: The report cannot be written.
    """
    if lines := _lines(samples):
        publish_text(path, "".join(f"{line}\n" for line in lines), shared=True)


def escaped(text: str) -> str:
    """Return a text with what is not UTF-8 as escapes: names in a tar may have any encoding."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_valid(line: bytes) -> bool:
    try:
        parse_json(line, _LINE)
    except ValueError:
        return False
    return line.isascii()


def _lines(samples: Iterable[tuple[str, str, str]]) -> list[str]:
    names = ("shard", "key", "reason")
    return [json.dumps(dict(zip(names, map(escaped, sample), strict=True))) for sample in samples]
