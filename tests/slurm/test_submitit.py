"""Outcomes of launched jobs by the exit codes of their ranks, on a real cluster, with a stub tool."""

import time
from pathlib import Path

import pytest

from tests.launchers.test_slurm import FINDS_A_MISTAKE, LOSES_A_RANK, launched
from tests.slurm.cluster import Cluster
from vqd_scale.launchers.job_record import State
from vqd_scale.launchers.slurm import Resources

pytestmark = pytest.mark.slurm
TWO_NODES = Resources(nodes="2", minutes=10, signal_seconds=60, requeues=1)
WAITS = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(folder / f"ready-{rank}").touch()
time.sleep(100 if start == 0 else 0)
"""


@pytest.fixture(autouse=True)
def started_on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("body", "starts", "message", "state", "code"),
    [
        (LOSES_A_RANK, 2, "done", "COMPLETED", 0),
        (FINDS_A_MISTAKE, 1, "it is gone.", "FAILED", 2),
        ("sys.exit(76)", 2, "ended with exit code 76 after all 1 restarts", "FAILED", 76),
    ],
)
def test_job_outcome_follows_exit_codes_of_ranks(
    cluster: Cluster, tmp_path: Path, body: str, starts: int, message: str, state: str, code: int
) -> None:
    launch = launched(tmp_path, body, TWO_NODES)
    (job,) = launch.jobs
    ended = cluster.finished(job)
    assert (ended.state, ended.exit_code, ended.restarts) == (state, code, starts - 1)
    final_state = launch.states()[job]
    assert final_state.summary.startswith(message)
    assert final_state.code == code
    assert len(list(tmp_path.glob("start-*-rank-1"))) == starts
    assert (tmp_path / "start-0-rank-1").read_text().split()[:3] == ["2", "0", "vqd1"]


def test_cancelled_job_is_not_restarted(cluster: Cluster, tmp_path: Path) -> None:
    launch = launched(tmp_path, WAITS, TWO_NODES)
    (job,) = launch.jobs
    cluster.until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)), why="both ranks")
    assert launch.states()[job] == State("running on vqd[1-2]", None)
    cluster.run("scancel", job)
    ended = cluster.finished(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    time.sleep(3)
    assert cluster.job(job).state == "CANCELLED"
    assert launch.states()[job].summary.startswith("canceled")


def test_preempted_job_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    launch = launched(tmp_path, WAITS, TWO_NODES)
    (job,) = launch.jobs
    cluster.until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)), why="both ranks")
    cluster.run("scancel", "--signal=TERM", job)
    ended = cluster.finished(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1)
