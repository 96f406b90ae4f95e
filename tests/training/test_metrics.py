from pathlib import Path

from vqd_scale.training.metrics import MetricsFile, read_metrics


def test_resuming_takes_out_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, images=0)
    for images in (8, 16, 24):
        first.write({"images": images, "loss": 1.0 / images})
    MetricsFile(path, images=16).write({"images": 24, "loss": 7.0})
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]
    assert read_metrics(path)[-1]["loss"] == 7.0


def test_a_row_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images": 8}\n{"images": 16}\n{"ima')
    assert [row["images"] for row in read_metrics(path)] == [8, 16]
    MetricsFile(path, images=16).write({"images": 24})
    assert [row["images"] for row in read_metrics(path)] == [8, 16, 24]
