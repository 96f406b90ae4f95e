"""Which worker a process is, from what was typed and from what Slurm and torchrun say."""

from pathlib import Path

import pytest
import torch

from vqd_scale.cli import tokenize_shards as command
from vqd_scale.data.shards.parallel_writer import Worker
from vqd_scale.preparation.tokenize_shards import TokenizeConfig

CONFIG = str(Path(__file__).parents[2] / "configs" / "tokenize" / "coco.yaml")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Who each call was."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    found: list[Worker] = []

    def note(config: TokenizeConfig, device: torch.device, worker: Worker) -> None:
        del config, device
        found.append(worker)

    monkeypatch.setattr(command, "tokenize_shards", note)
    return found


def array(monkeypatch: pytest.MonkeyPatch, task: int, first: int, last: int, count: int) -> None:
    """The variables of a job of an array."""
    for name, value in (("ID", task), ("MIN", first), ("MAX", last), ("COUNT", count)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


def test_alone_and_as_typed(workers: list[Worker], capsys: pytest.CaptureFixture[str]) -> None:
    command.main([CONFIG])
    command.main([CONFIG, "--worker", "2", "--workers", "5"])
    assert workers == [Worker(0, 1), Worker(2, 5)]
    assert "worker 2 of 5 is done, others are not" in capsys.readouterr().out


def test_a_job_of_an_array_and_its_ranks(workers: list[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    array(monkeypatch, task=12, first=10, last=13, count=4)
    command.main([CONFIG])
    command.main([CONFIG, "--worker", "0", "--workers", "1"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    command.main([CONFIG])
    assert workers == [Worker(2, 4), Worker(0, 1), Worker(17, 32)]


def test_what_leaves_it_open_is_one_sentence(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array(monkeypatch, task=17, first=3, last=17, count=2)
    for arguments, sentence in (
        (["--worker", "1"], "give both or neither"),
        (["--worker", "4", "--workers", "4"], "numbered from 0 to 3"),
        ([], "an array without gaps"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main([CONFIG, *arguments])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not workers
