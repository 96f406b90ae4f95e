import json
from pathlib import Path

from vqd_scale.core.store import publish_text, writing


class Quarantine:
    """A report of the samples that could not be used: a JSON line with shard, key and reason for each.

    A sample met again, in a later epoch or after a restart, is not reported again.

    Raises:
        UserError: The report cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        # A kill may have left half a line, which the next one must not be joined to.
        if whole != text:
            publish_text(path, whole)
        self._lines = set(whole.splitlines())

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, shard: str, key: str, reason: str) -> None:
        """Report a sample.

        Raises:
            UserError: The report cannot be written.
        """
        line = json.dumps({"shard": shard, "key": key, "reason": reason})
        if line in self._lines:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self._lines.add(line)
