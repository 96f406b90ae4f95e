"""Fuzzing of ``metrics.jsonl``: at a resume, damaged lines are left out, and all others are kept."""

import json
from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.training.logging.metrics import MetricsFile, read_metrics

ROWS = [{"images": images, "loss": 1.5, "rate": 1e-4} for images in range(8, 80, 8)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
CORPUS = [
    LINES,
    LINES[:-20],
    LINES + b'{"images": true}\n{"images": 8, "loss": null}\n[]\n5\n\xff\xfe\n{"images": 1e999}\n',
    b'{"images": ' + b"9" * 5000 + b"}\n" + b"[" * 5000 + b"\n",
    b"\0" * 4096 + LINES,
    b'{"images": 8, "loss": NaN}\n',
]


@pytest.mark.parametrize("seconds", SECONDS)
def test_damaged_rows_are_left_out(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        MetricsFile(path, 1000).write({"images": 2000})
        rows = read_metrics(path)
        assert rows[-1] == {"images": 2000}
        assert all(type(value) in (int, float) for row in rows for value in row.values())
        intact = set(data.split(b"\n")[:-1]) & set(LINES.splitlines())
        assert all(json.loads(line) in rows for line in intact)
        for damaged in tmp_path.glob("*.damaged*"):
            damaged.unlink()

    assert fuzz(target, CORPUS, seconds, tmp_path / "failure") > len(CORPUS)
