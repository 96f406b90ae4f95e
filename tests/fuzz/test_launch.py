"""Fuzzing of the records of launches and of their outcomes."""

from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.launchers.job_record import Launch, State, outcome_file

RECORD = b'{"name": "train", "cluster": "local", "jobs": ["7"], "run": "runs/mine", "details": {}}'
OUTCOME = b'{"code": 0, "summary": "done"}'
CORPUS = [
    RECORD,
    OUTCOME,
    b"[]",
    b"null",
    b"5",
    RECORD.replace(b'["7"]', b'"7"'),
    RECORD.replace(b"7", b"../7"),
]


@pytest.mark.parametrize("seconds", SECONDS)
def test_record_is_read_or_refused(seconds: float, tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        (tmp_path / "launch.json").write_bytes(data)
        launch = Launch.read(tmp_path)
        assert all("/" not in job for job in launch.jobs)

    assert fuzz(target, CORPUS, seconds, tmp_path / "failure") > len(CORPUS)


@pytest.mark.parametrize("seconds", SECONDS)
def test_outcome_is_read_or_refused(seconds: float, tmp_path: Path) -> None:
    launch = Launch(tmp_path, "train", "debug", ("7",), "runs/mine")
    path = outcome_file(tmp_path, "7")
    path.parent.mkdir()

    def target(data: bytes) -> None:
        path.write_bytes(data)
        (state,) = launch.states().values()
        assert isinstance(state, State)

    assert fuzz(target, CORPUS, seconds, tmp_path / "failure") > len(CORPUS)
