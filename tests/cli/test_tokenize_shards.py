"""The worker number of a process, from arguments or from Slurm's and torchrun's variables."""

from pathlib import Path

import pytest
import torch

from vqd_scale.cli import tokenize_shards as command
from vqd_scale.data.shards.parallel_writer import Worker
from vqd_scale.preparation.config import TokenizeConfig

CONFIG = str(Path(__file__).parents[2] / "configs" / "tokenize" / "coco.yaml")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Record the worker of each call."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    recorded_workers: list[Worker] = []

    def note(config: TokenizeConfig, device: torch.device, worker: Worker) -> None:
        del config, device
        recorded_workers.append(worker)

    monkeypatch.setattr("vqd_scale.preparation.tokenize_shards.tokenize_shards", note)
    for check in ("check_datasets", "check_bundles"):
        monkeypatch.setattr(command, check, str)
    return recorded_workers


def array(monkeypatch: pytest.MonkeyPatch, task: int, first: int, last: int, count: int) -> None:
    """Set the variables of a job in an array."""
    for name, value in (("ID", task), ("MIN", first), ("MAX", last), ("COUNT", count)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


def test_worker_from_arguments(workers: list[Worker], capsys: pytest.CaptureFixture[str]) -> None:
    command.main([CONFIG])
    command.main([CONFIG, "--worker", "2", "--num-workers", "5"])
    assert workers == [Worker(0, 1), Worker(2, 5)]
    assert "worker 2 of 5 is done, others are not" in capsys.readouterr().out


def test_worker_from_slurm_array_and_ranks(workers: list[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    array(monkeypatch, task=12, first=10, last=13, count=4)
    command.main([CONFIG])
    command.main([CONFIG, "--worker", "0", "--num-workers", "1"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    command.main([CONFIG])
    assert workers == [Worker(2, 4), Worker(0, 1), Worker(17, 32)]


def test_ambiguous_worker_exits_2(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array(monkeypatch, task=17, first=3, last=17, count=2)
    for arguments, sentence in (
        (["--worker", "1"], "give both or neither"),
        (["--worker", "4", "--num-workers", "4"], "numbered from 0 to 3"),
        ([], "an array without gaps"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main([CONFIG, *arguments])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not workers
