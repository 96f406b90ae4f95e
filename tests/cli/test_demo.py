"""The short demo, killed at every stage; the long tests compare it with an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqd_scale.cli import demo
from vqd_scale.core.errors import UserError
from vqd_scale.training.logging.metrics import read_metrics

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_demo_losses.json")
WINDOW = 8


def start(out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "tools/demo.py", "--fast", "--output", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def checkpointed(run: Path) -> bool:
    return any(int(path.name) > 0 for path in run.glob("checkpoints/*") if path.name.isdigit())


KILLS: list[Callable[[Path], bool]] = [
    lambda out: checkpointed(out / "tokenizer"),
    lambda out: (out / "tokens" / "000000.tar").exists(),
    lambda out: checkpointed(out / "model"),
    lambda out: len(list((out / "samples").glob("0*.png"))) >= 32,
    lambda out: any((out / "evaluation" / "parts").glob("*.safetensors")),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the demo's folder after a kill in every stage, and the output of its last start."""
    out = tmp_path_factory.mktemp("demo") / "killed"
    for reached in KILLS:
        process = start(out)
        while process.poll() is None and not reached(out):
            time.sleep(0.02)
        assert process.poll() is None, "the stage was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return out, output_of(start(out))


def output_of(process: "subprocess.Popen[str]") -> str:
    """Return the output of a demo that ends by itself."""
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_report_contents(finished: tuple[Path, str]) -> None:
    demo_report = report(finished[0])
    accuracy = demo_report["attribute_accuracy"]
    # A stub of any stage would give the chance level, or less than the tokenizer's threshold.
    assert accuracy["mean"] > accuracy["shuffled"] + 0.1
    assert accuracy["per_attribute"]["background"] > 0.5
    assert demo_report["reader_on_truth"] >= 0.995
    assert demo_report["tokenizer_ceiling"] > 0.6
    assert demo_report["tokenizer_psnr"] > 20
    assert demo_report["frechet_distance_of_tokenizer_features"] > 0
    preparation = ["make_shards", "train_tokenizer", "evaluate_tokenizer", "tokenize_shards"]
    assert list(demo_report["seconds"]) == [*preparation, "train", "sample", "evaluate"]


def test_expected_output_files_exist(finished: tuple[Path, str]) -> None:
    out, printed = finished
    for image_file in ("samples/grid.png", "tokenizer-report/reconstructions.png", "loss.png"):
        assert Image.open(out / image_file).size[0] > 300
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page
    # No attribute is a URL, so nothing is fetched. Images in base64 may contain any letters.
    assert '="http' not in page
    assert "url(" not in page
    assert (out / "shards" / "train" / "index.json").exists()
    assert (out / "model" / "config.yaml").exists()
    assert not list(out.rglob("*.partial"))
    assert str(out / "samples" / "grid.png") in printed
    assert "Traceback" not in printed


def test_losses_follow_golden_curve(finished: tuple[Path, str]) -> None:
    """Compare window means, since rounding and so the tokens differ between processors."""
    rows = read_metrics(finished[0] / "model" / "metrics.jsonl")
    golden = json.loads(GOLDEN.read_text())
    assert [row["images"] for row in rows] == golden["images"]
    for first in range(0, len(rows), WINDOW):
        losses = [row["cross_entropy"] for row in rows[first : first + WINDOW]]
        expected = golden["cross_entropy"][first : first + WINDOW]
        assert sum(losses) / len(losses) == pytest.approx(sum(expected) / len(expected), rel=0.1)


def test_finished_demo_skips_every_stage(finished: tuple[Path, str]) -> None:
    assert output_of(start(finished[0])).count("done before") == 7


@pytest.mark.long
def test_demo_killed_in_every_stage_gives_equal_report(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, reference_run = finished[0], tmp_path / "whole"
    output_of(start(reference_run))
    report_after_kills, reference_report = report(out), report(reference_run)
    assert report_after_kills.pop("seconds").keys() == reference_report.pop("seconds").keys()
    assert report_after_kills == reference_report
    assert read_losses(out) == read_losses(reference_run)
    for weights in ("tokenizer/export/model.safetensors", "model/export/model.safetensors"):
        assert (out / weights).read_bytes() == (reference_run / weights).read_bytes()
    for image_file in reference_run.glob("samples/*.png"):
        assert (out / "samples" / image_file.name).read_bytes() == image_file.read_bytes()


def read_losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "model" / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stages.json", "[]"),
        ("stages.json", '{"train": "5"}'),
        ("evaluation/report.json", '{"count": 3}'),
        ("tokenizer-report/report.json", "{}"),
    ],
)
def test_report_of_another_shape_is_named(name: str, content: str, tmp_path: Path) -> None:
    evaluation = {"count": 1, "figures": {"frechet_distance_tokenizer": 1, "alignment": {}}}
    valid = {"stages.json": "{}", "evaluation/report.json": json.dumps(evaluation)}
    for file, text in {**valid, name: content}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{name}: this .* cannot be read"):
        demo._run([], tmp_path, tmp_path)  # pyright: ignore[reportPrivateUsage]
        demo._metrics(tmp_path)  # pyright: ignore[reportPrivateUsage]
