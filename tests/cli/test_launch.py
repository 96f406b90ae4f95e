"""Launches that are refused before anything is queued; tests/slurm has jobs on a real cluster."""

from pathlib import Path

import pytest

from vqd_scale.cli.launch import main
from vqd_scale.core.outputs import JOBS, TRAINING, reserve
from vqd_scale.core.run_lock import RunLock
from vqd_scale.data.config import StreamConfig
from vqd_scale.launchers import slurm
from vqd_scale.launchers.job_record import Launch, State


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the launches, which submit nothing."""
    folders: list[Path] = []

    def submit(name: str, commands: object, resources: object, folder: Path, *_: object) -> Launch:
        folders.append(folder)
        return Launch(folder, name, "slurm", (), str(folder))

    monkeypatch.setattr(slurm, "launch", submit)
    return folders


@pytest.mark.parametrize(("signal_seconds", "hours"), [("300", "0.08"), ("60", "0.0166"), ("3600", "1")])
def test_signal_before_the_start_is_refused(
    folders: list[Path], tmp_path: Path, signal_seconds: str, hours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["eval", str(tmp_path), "--signal-seconds", signal_seconds, "--hours", hours])
    assert end.value.code == 2
    assert f"--signal-seconds: given {signal_seconds}, allowed: less than" in capsys.readouterr().err
    assert folders == []


def test_launches_of_one_second_have_folders_in_their_order(folders: list[Path], tmp_path: Path) -> None:
    for _ in range(3):
        main(["eval", str(tmp_path)])
    assert folders == sorted(set(folders))
    assert len(folders) == 3


def test_launch_into_a_run_with_a_job_or_a_process_is_refused(
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    def accept(_: StreamConfig) -> None:
        pass

    monkeypatch.setattr("vqd_scale.cli.launch._check_data", accept)
    arguments = ["configs/demo/train.yaml", f"run={tmp_path / 'run'}", "--cluster", "local"]
    jobs = tmp_path / "run" / JOBS / "1"
    jobs.mkdir(parents=True)
    Launch(jobs, "train", "local", ("7",), str(tmp_path / "run")).write()
    state = State("pending (Resources)", None)

    def states(_: Launch) -> dict[str, State]:
        return {"7": state}

    monkeypatch.setattr(Launch, "states", states)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "job 7 is pending (Resources); cancel it with `python tools/launch.py cancel" in (
        capsys.readouterr().err
    )
    assert folders == []
    state = State("done", 0)
    reserve(tmp_path / "run", TRAINING, [], siblings=[JOBS])
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    with pytest.raises(SystemExit):
        main(arguments)
    assert "trains here; end it first" in capsys.readouterr().err
    lock.close()
    main(arguments)
    assert len(folders) == 1
