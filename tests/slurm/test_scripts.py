"""What the scripts do about jobs that end badly, with a tool that does nothing else; and what they show."""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Submit, Submitted

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if "\n#SBATCH --" in path.read_text()]


def stand_in(folder: Path, body: str) -> str:
    """A program in python's place, given the tool and its arguments."""
    path = folder / "stand-in"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slurm
def test_restarts_are_counted_and_end(submit: Submit) -> None:
    submitted = submit("train_f.sh", MAX_REQUEUES="1", PYTHON=stand_in(submit.folder, "exit 75"))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 1)
    assert submitted.log.count("the job is queued again") == 1
    assert "after all 1 restarts that MAX_REQUEUES allows" in submitted.log.splitlines()[-1]
    assert "finetune" not in submitted.log


@pytest.mark.slurm
def test_a_stage_that_is_done_is_not_started_again(submit: Submit) -> None:
    fails_once = 'case "$2" in *finetune*) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 76 ;; esac'
    submitted = submit("train_f.sh", PYTHON=stand_in(submit.folder, fails_once))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), submitted.log
    assert submitted.log.count("pretrain: start") == 1
    assert "pretrain: done by an earlier start of this job" in submitted.log
    assert submitted.log.count("finetune: start") == 2


@pytest.mark.slurm
def test_a_mistake_of_one_rank_is_said_and_not_made_again(submit: Submit) -> None:
    """Though the others, ended while they wait for that one, have higher exit codes."""
    body = 'if [ "$SLURM_PROCID" = 1 ]; then echo "data: it is gone." >&2; exit 2; fi; sleep 100'
    submitted = submit("train_b.sh", PYTHON=stand_in(submit.folder, body))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0)
    assert "train: data: it is gone." in submitted.log
    assert "queued again" not in submitted.log


SAVES = """
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap "exit 75" TERM
touch "$(dirname "$0")/ready-$SLURM_PROCID"
while true; do sleep 0.1; done
"""


def waiting(submit: Submit) -> Submitted:
    """A job of two ranks that save themselves when they are asked to stop."""
    submitted = submit("train_b.sh", options=("--exclusive",), PYTHON=stand_in(submit.folder, SAVES))
    ready = [submit.folder / f"ready-{rank}" for rank in (0, 1)]
    submitted.cluster.until(lambda: all(path.exists() for path in ready), why="both ranks")
    return submitted


@pytest.mark.slurm
def test_a_more_urgent_job_takes_the_nodes_and_gives_them_back(submit: Submit) -> None:
    submitted = waiting(submit)
    urgent = submitted.cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    assert submitted.cluster.finished(urgent).state == "COMPLETED"
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1)
    assert "train: ended with exit code 75; the job is queued again" in submitted.log


@pytest.mark.slurm
def test_a_cancelled_job_does_not_come_back(submit: Submit) -> None:
    submitted = waiting(submit)
    submitted.cluster.run("scancel", submitted.number)
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert "queued again" not in submitted.log


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ((), {"CONFIG": "/nowhere.yaml"}, "/nowhere.yaml: the configuration file cannot be read"),
        (("data.path=/nowhere",), {}, "/nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    submit: Submit, arguments: tuple[str, ...], variables: dict[str, str], sentence: str
) -> None:
    submitted = submit("train_b.sh", *arguments, options=("--nodes=1",), **variables)
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), submitted.log
    assert sentence in submitted.log.splitlines()[-1]
    assert "Traceback" not in submitted.rank_log("train", 0)
    assert not submitted.run("pretrain").exists()


@pytest.mark.slurm
def test_a_partition_that_is_not_there_is_refused(submit: Submit) -> None:
    with pytest.raises(RuntimeError, match="invalid partition specified: nowhere"):
        submit("train_b.sh", options=("--partition=nowhere",))
    assert not (submit.folder / "logs").exists()


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_a_dry_run_shows_what_would_run(script: Path) -> None:
    done = subprocess.run(
        ["bash", f"slurm/{script.name}", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if script.name == "train_f.sh" else 1)
    for line in lines:
        words = line.split()
        assert words[0] == "srun"
        named = [word for word in words if word.startswith(("tools/", "configs/"))]
        assert named
        assert all((ROOT / word).is_file() for word in named), line


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_scripts_can_be_started_again_and_say_so_when_typed(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=USR2@", "--time=", "--output=slurm/logs/"):
        assert f"#SBATCH {line}" in text
    typed = subprocess.run(
        ["bash", f"slurm/{script.name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert typed.returncode == 2
    assert typed.stderr == (
        f"this is a job: sbatch slurm/{script.name}, or bash slurm/{script.name} --dry-run to see what would "
        "run\n"
    )
