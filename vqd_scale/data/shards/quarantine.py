import json
from collections.abc import Iterable

from vqd_scale.core.atomic_io import Location, publish_text, writing
from vqd_scale.core.s3 import S3Path

QUARANTINE = "quarantine.jsonl"
"""File name of the report of bad samples of a dataset."""

DUPLICATES = "near_duplicates.jsonl"
"""File name of the report of samples skipped as near-duplicates of excluded images."""


class Quarantine:
    """Report of bad samples: one JSON line with shard, key and reason per sample.

    A sample that occurs again, in a later epoch or after a restart, is reported once.

    Raises:
        UserError: The report cannot be written.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete_lines = text[: text.rfind("\n") + 1]
        # A kill may have left a partial line; remove it before lines are appended.
        if complete_lines != text:
            publish_text(path, complete_lines)
        self._lines = dict.fromkeys(complete_lines.splitlines())

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


def _lines(samples: Iterable[tuple[str, str, str]]) -> list[str]:
    return [json.dumps({"shard": shard, "key": key, "reason": reason}) for shard, key, reason in samples]
