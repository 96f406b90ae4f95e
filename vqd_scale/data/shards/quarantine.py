import json
from collections.abc import Iterable

from vqd_scale.core.atomic_io import Location, publish_text, writing
from vqd_scale.core.s3 import S3Path

QUARANTINE = "quarantine.jsonl"
"""Name of the report of what could not be used when a set was made."""

DUPLICATES = "near_duplicates.jsonl"
"""Name of the report of what was left out of a set for its likeness to pictures that must not occur."""


class Quarantine:
    """A report of the samples that could not be used: a JSON line with shard, key and reason for each.

    A sample met again, in a later epoch or after a restart, is not reported again.

    Raises:
        UserError: The report cannot be written.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        # A kill may have left half a line, which the next one must not be joined to.
        if whole != text:
            publish_text(path, whole)
        self._lines = dict.fromkeys(whole.splitlines())

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, shard: str, key: str, reason: str) -> None:
        """Report a sample.

        Raises:
            UserError: The report cannot be written.
        """
        self.extend([(shard, key, reason)])

    def extend(self, found: Iterable[tuple[str, str, str]]) -> None:
        """Report samples, each as (shard, key, reason).

        Raises:
            UserError: The report cannot be written.
        """
        lines = _lines(found)
        new = [line for line in dict.fromkeys(lines) if line not in self._lines]
        self._lines |= dict.fromkeys(new)
        if not new:
            return
        if isinstance(self.path, S3Path):
            # Objects cannot be added to.
            publish_text(self.path, "".join(f"{line}\n" for line in self._lines))
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in new)


def publish_report(path: Location, found: Iterable[tuple[str, str, str]]) -> None:
    """Write a report at once, in the place of any before; several processes may do it at the same time.

    Args:
        path: The report; not written where there is nothing to report.
        found: The samples, each as (shard, key, reason).

    Raises:
        UserError: The report cannot be written.
    """
    if lines := _lines(found):
        publish_text(path, "".join(f"{line}\n" for line in lines), shared=True)


def _lines(found: Iterable[tuple[str, str, str]]) -> list[str]:
    return [json.dumps({"shard": shard, "key": key, "reason": reason}) for shard, key, reason in found]
