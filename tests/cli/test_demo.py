"""The whole road in its short form, killed at every stage; the long tests have one in peace beside it."""

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

from vqd_scale.training.logging.metrics import read_metrics

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_demo_losses.json")
WINDOW = 8


def start(out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "tools/demo.py", "--fast", "--out", str(out)],
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
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder after a run that was killed in every stage, and what its last start printed."""
    out = tmp_path_factory.mktemp("demo") / "killed"
    for reached in KILLS:
        process = start(out)
        while process.poll() is None and not reached(out):
            time.sleep(0.02)
        assert process.poll() is None, "the stage was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return out, ended(start(out))


def ended(process: "subprocess.Popen[str]") -> str:
    """What an undisturbed start printed."""
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_report_says_what_was_reached(finished: tuple[Path, str]) -> None:
    found = report(finished[0])
    accuracy = found["attribute_accuracy"]
    # A stub of any stage falls to the chance level, or below the tokenizer's bar.
    assert accuracy["mean"] > accuracy["shuffled"] + 0.1
    assert accuracy["per_attribute"]["background"] > 0.5
    assert found["reader_on_truth"] >= 0.995
    assert found["tokenizer_ceiling"] > 0.6
    assert found["tokenizer_psnr"] > 20
    assert found["frechet_distance_of_tokenizer_features"] > 0
    stages = ["make_shards", "train_tokenizer", "tokenize_shards", "train", "sample", "evaluate"]
    assert list(found["seconds"]) == stages


def test_everything_that_is_promised_lies_there(finished: tuple[Path, str]) -> None:
    out, printed = finished
    for picture in ("samples/grid.png", "evaluation/reconstructions.png", "loss.png"):
        assert Image.open(out / picture).size[0] > 300
    page = (out / "report.html").read_text()
    assert "data:image/png;base64" in page
    # Nothing is fetched: no attribute is an address. Pictures in base64 may hold any letters.
    assert '="http' not in page
    assert "url(" not in page
    assert (out / "shards" / "train" / "index.json").exists()
    assert (out / "model" / "config.yaml").exists()
    assert not list(out.rglob("*.partial"))
    assert str(out / "samples" / "grid.png") in printed
    assert "Traceback" not in printed


def test_losses_follow_the_golden_curve(finished: tuple[Path, str]) -> None:
    """Window means, since another processor rounds otherwise and the tokens follow."""
    rows = read_metrics(finished[0] / "model" / "metrics.jsonl")
    golden = json.loads(GOLDEN.read_text())
    assert [row["images"] for row in rows] == golden["images"]
    for first in range(0, len(rows), WINDOW):
        found = [row["cross_entropy"] for row in rows[first : first + WINDOW]]
        expected = golden["cross_entropy"][first : first + WINDOW]
        assert sum(found) / len(found) == pytest.approx(sum(expected) / len(expected), rel=0.1)


def test_a_second_run_finds_everything_done(finished: tuple[Path, str]) -> None:
    assert ended(start(finished[0])).count("done before") == 6


@pytest.mark.long
def test_killed_in_every_stage_it_comes_to_the_same_end(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, whole = finished[0], tmp_path / "whole"
    ended(start(whole))
    ours, theirs = report(out), report(whole)
    assert ours.pop("seconds").keys() == theirs.pop("seconds").keys()
    assert ours == theirs
    assert read_losses(out) == read_losses(whole)
    for weights in ("tokenizer/export/model.safetensors", "model/export/model.safetensors"):
        assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    for picture in whole.glob("samples/*.png"):
        assert (out / "samples" / picture.name).read_bytes() == picture.read_bytes()


def read_losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "model" / "metrics.jsonl")]
