"""The run's diary: one JSON object a line, images seen first."""

import json
from collections.abc import Mapping
from pathlib import Path

from vqd_scale.core.store import publish_text, writing


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

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row.

        Raises:
            UserError: The disk is full.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows of a metrics file; none if there is no file. A row that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
