"""Stops of a training process: Ctrl-C, and signals before the first step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, RunTool
from vqd_scale.cli.train import main
from vqd_scale.core import world
from vqd_scale.core.signals import REQUEUE_EXIT_CODE
from vqd_scale.core.world import World, join_world
from vqd_scale.training.logging.metrics import read_metrics


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGUSR2, 2, "the signal before the time limit came before the first step; allow more time"),
        (signal.SIGTERM, REQUEUE_EXIT_CODE, ""),
        (signal.SIGINT, REQUEUE_EXIT_CODE, ""),
    ],
)
def test_signal_before_the_first_step_ends_without_a_step(
    token_world: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def join() -> World:
        os.kill(os.getpid(), number)
        return join_world()

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(world, "join_world", join)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main([str(token_world / "train.yaml"), f"run={run}"])
    assert end.value.code == code
    assert sentence in capsys.readouterr().err
    assert not read_metrics(run / "metrics.jsonl")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_under_torchrun_saves_the_last_step(token_world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [str(token_world / "train.yaml"), f"run={run}", "checkpoint.every_images=1000000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "tools/train.py", *arguments], cwd=ROOT, stderr=log, start_new_session=True
        )
        while not read_metrics(run / "metrics.jsonl") and process.poll() is None:
            time.sleep(0.05)
        # As a terminal does: to all processes of its group.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=120)
    text = (tmp_path / "log").read_text()
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert newest == read_metrics(run / "metrics.jsonl")[-1]["images"], text
    assert text.count("Ctrl-C again: at once") == 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key"),
        ("engine.gradient_accumulation_steps=3", "cannot be cut into 2 ranks times 3 parts"),
    ],
    ids=["before the rendezvous", "after"],
)
def test_mistake_of_all_ranks_is_printed_once(
    token_world: Path, tmp_path: Path, run_tool: RunTool, override: str, sentence: str
) -> None:
    config = str(token_world / "train.yaml")
    completed = run_tool("train.py", config, f"run={tmp_path / 'run'}", override, ranks=2)
    assert completed.returncode == 2
    assert completed.stderr.count(sentence) == 1
