"""Jobs through Submitit as processes of this machine; tests/slurm has the same on a real cluster."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vqd_scale.core.errors import UserError
from vqd_scale.launchers.job_record import Launch, State, check_none_active, newest_launch
from vqd_scale.launchers.slurm import Resources, launch

pytestmark = pytest.mark.ranks
TWO_RANKS = Resources(cluster="local", ranks_per_node=2, minutes=5, requeues=1)

TOOL = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
start = len(list(folder.glob(f"start-*-rank-{rank}")))
(folder / f"start-{start}-rank-{rank}").write_text(
    " ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "PYTHONPATH")))
while len(list(folder.glob(f"start-{start}-rank-*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
"""


def launched(folder: Path, body: str, resources: Resources = TWO_RANKS) -> Launch:
    tool = folder / "tool.py"
    tool.write_text(TOOL + body)
    # An absolute path takes the place of a tool in the copy.
    return launch("test", [[str(tool), str(folder)]], resources, folder / "jobs" / "1", folder)


def outcome(launch: Launch) -> State:
    deadline = time.monotonic() + 120
    while True:
        (state,) = launch.states().values()
        if state.has_ended or time.monotonic() > deadline:
            return state
        time.sleep(0.1)


def test_every_rank_gets_its_number_and_imports_the_copy(tmp_path: Path) -> None:
    job = launched(tmp_path, "print('hello from', rank)")
    assert outcome(job) == State("done", 0)
    for rank in (0, 1):
        rank_output = (tmp_path / f"start-0-rank-{rank}").read_text()
        assert rank_output == f"2 {rank} 127.0.0.1 {tmp_path / 'jobs' / '1' / 'code'}"
    output, _ = job.logs(job.jobs[0])
    assert "hello from 0" in output.read_text()
    assert newest_launch(tmp_path) == job


PROGRESSES = "pathlib.Path(os.environ['VQD_PROGRESS_FILE']).touch()\n"
LOSES_A_RANK = """
if start == 0 and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(0 if start else 1)
"""
FINDS_A_MISTAKE = """
if rank == "1":
    print("it is gone.", file=sys.stderr)
    sys.exit(2)
time.sleep(2)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("body", "starts", "message", "code"),
    [
        ("sys.exit(75 if start == 0 else 0)", 2, "done", 0),
        (LOSES_A_RANK, 2, "done", 0),
        (FINDS_A_MISTAKE, 1, "it is gone.", 2),
        (
            f"{PROGRESSES}sys.exit(76)",
            3,
            "ended with exit code 76 after all 2 restarts that --max-requeues",
            76,
        ),
        ("sys.exit(1)", 2, "ended twice with exit code 1 before any progress", 1),
        (f"start or sys.exit(1)\n{PROGRESSES}sys.exit(0 if start == 2 else 1)", 3, "done", 0),
    ],
)
def test_job_outcome_follows_exit_codes_of_ranks(
    tmp_path: Path, body: str, starts: int, message: str, code: int
) -> None:
    state = outcome(launched(tmp_path, body, replace(TWO_RANKS, requeues=2)))
    assert state.summary.startswith(message)
    assert state.code == code
    assert len(list(tmp_path.glob("start-*-rank-0"))) == starts


def test_cancelled_job_saves_and_is_not_restarted(tmp_path: Path) -> None:
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / f'saved-{rank}').touch(), sys.exit(75)))\n"
        "(folder / f'ready-{rank}').touch()\ntime.sleep(100)"
    )
    job = launched(tmp_path, body)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    job.cancel()
    assert outcome(job).summary.startswith("canceled")
    assert (tmp_path / "saved-0").exists()
    assert not list(tmp_path.glob("start-1-*"))


def test_each_start_has_a_port_unless_the_user_sets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "(folder / f'port-{start}-{rank}').write_text(os.environ['MASTER_PORT'])\n"
        "sys.exit(0 if start else 75)"
    )

    def ports(folder: Path) -> list[str]:
        folder.mkdir()
        assert outcome(launched(folder, body)).code == 0
        return [(folder / f"port-{start}-{rank}").read_text() for start in (0, 1) for rank in (0, 1)]

    first, same, second, also = ports(tmp_path / "derived")
    assert first == same != second == also
    monkeypatch.setenv("MASTER_PORT", "4711")
    assert set(ports(tmp_path / "set")) == {"4711"}
    monkeypatch.setenv("RENDEZVOUS_OF_JOB", "another")
    assert "4711" not in ports(tmp_path / "of-another-job")


def test_run_with_an_active_job_is_refused(tmp_path: Path) -> None:
    job = launched(tmp_path, "time.sleep(100)", Resources(cluster="local", requeues=0))
    with pytest.raises(UserError, match=f"job {job.jobs[0]} is running; cancel it with"):
        check_none_active(tmp_path / "jobs")
    job.cancel()
    outcome(job)
    check_none_active(tmp_path / "jobs")


def test_job_of_another_cluster_blocks_no_copied_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    (tmp_path / "1").mkdir()
    Launch(tmp_path / "1", "train", "slurm", ("7",), "runs/mine").write()
    check_none_active(tmp_path)


def test_debug_cluster_runs_in_one_process(tmp_path: Path) -> None:
    job = launched(tmp_path, "sys.exit(0)", Resources(cluster="debug"))
    assert outcome(job) == State("done", 0)


def test_missing_slurm_raises_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UserError, match="has no Slurm: launch with --cluster local"):
        launched(tmp_path, "", Resources())
    with pytest.raises(UserError, match="contains no launch"):
        newest_launch(tmp_path)
