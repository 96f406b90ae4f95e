import resource
from pathlib import Path

import pytest

from vqd_scale.training.logging.metrics import MetricsFile, read_metrics


def test_resume_removes_rows_to_be_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, images=0)
    for images in (8, 16, 24):
        first.write({"images": images, "loss": 1.0 / images})
    MetricsFile(path, images=16).write({"images": 24, "loss": 7.0})
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]
    assert read_metrics(path)[-1]["loss"] == 7.0


def test_partial_row_after_kill_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images": 8}\n{"images": 16}\n{"ima')
    assert [row["images"] for row in read_metrics(path)] == [8, 16]
    MetricsFile(path, images=16).write({"images": 24})
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 4096 + b"\n",
        b"\xff\xfe\n",
        b'{"images": 1\n',
        b"[]\n",
        b"null\n",
        b"{}\n",
        b'{"images": "x"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_damaged_lines_are_left_out_and_the_file_is_kept(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"images": 8}\n' + damage + b'{"images": 16}\n{"images": 24}\n'
    path.write_bytes(content)
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]
    MetricsFile(path, images=16).write({"images": 24})
    assert path.read_text() == '{"images": 8}\n{"images": 16}\n{"images": 24}\n'
    assert "1 damaged lines are left out" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


def test_full_disk_buffers_rows_without_partial_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, images=0)
    file.write({"images": 8, "loss": 1.0})
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        file.write({"images": 16, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size
    assert "Training continues; 1 rows are pending" in caplog.text
    file.write({"images": 24, "loss": 0.25})
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]
