"""What the scripts do about jobs that end badly, with a tool that does nothing else; and what they show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Submit, Submitted

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if "\n#SBATCH --" in path.read_text()]


READS_CONFIG = 'case "$*" in *--print-config) exit 0 ;; esac'
"""What a stand-in for ranks does when the job only reads its configuration."""


def stand_in(folder: Path, body: str, *, name: str = "stand-in") -> str:
    """A program in python's place, given the tool and its arguments."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def ranks_stand_in(folder: Path, body: str) -> str:
    """The same for the ranks alone: it has no configuration to read."""
    return stand_in(folder, f"{READS_CONFIG}\n{body}")


def run_script(script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a job's script from the project's top folder."""
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slurm
def test_restarts_are_counted_and_end(submit: Submit) -> None:
    submitted = submit("train_f.sh", MAX_REQUEUES="1", PYTHON=ranks_stand_in(submit.folder, "exit 75"))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 1)
    assert submitted.log.count("the job is queued again") == 1
    assert "after all 1 restarts that MAX_REQUEUES allows" in submitted.log.splitlines()[-1]
    assert "finetune" not in submitted.log


@pytest.mark.slurm
def test_a_stage_that_is_done_is_not_started_again(submit: Submit) -> None:
    fails_once = 'case "$2" in *finetune*) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 76 ;; esac'
    submitted = submit("train_f.sh", PYTHON=ranks_stand_in(submit.folder, fails_once))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), submitted.log
    assert submitted.log.count("pretrain: start") == 1
    assert "pretrain: done by an earlier start of this job" in submitted.log
    assert submitted.log.count("finetune: start") == 2


@pytest.mark.slurm
def test_a_mistake_of_one_rank_is_said_and_not_made_again(submit: Submit) -> None:
    """Though the others, ended while they wait for that one, have higher exit codes."""
    body = 'if [ "$SLURM_PROCID" = 1 ]; then echo "data: it is gone." >&2; exit 2; fi; sleep 100'
    submitted = submit("train_b.sh", PYTHON=ranks_stand_in(submit.folder, body))
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
    submitted = submit("train_b.sh", options=("--exclusive",), PYTHON=ranks_stand_in(submit.folder, SAVES))
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
def test_a_mistake_in_the_configuration_ends_the_job_before_its_ranks(submit: Submit) -> None:
    submitted = submit("train_b.sh", options=("--nodes=1",), CONFIG="/nowhere.yaml")
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), submitted.log
    (sentence,) = submitted.log.splitlines()
    assert "/nowhere.yaml: the configuration file cannot be read" in sentence
    assert not (submitted.folder / "logs").exists()


@pytest.mark.slurm
def test_mistakes_of_ranks_are_one_sentence_and_leave_nothing(submit: Submit) -> None:
    submitted = submit("train_b.sh", "data.path=/nowhere", options=("--nodes=1",))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), submitted.log
    assert "/nowhere" in submitted.log.splitlines()[-1]
    assert "Traceback" not in submitted.rank_log("train", 0)
    assert not submitted.run("pretrain").exists()


@pytest.mark.slurm
def test_a_partition_that_is_not_there_is_refused(submit: Submit) -> None:
    with pytest.raises(RuntimeError, match="invalid partition specified: nowhere"):
        submit("train_b.sh", options=("--partition=nowhere",))
    assert not (submit.folder / "logs").exists()


PRETRAIN, FINETUNE = (f"tools/train.py configs/f/{name}.yaml" for name in ("pretrain", "finetune"))
RECORDS = 'echo "$@" >> "$(dirname "$0")/calls"'


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_a_dry_run_shows_what_would_run(script: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path, f"{RECORDS}\necho seed: 3")
    done = run_script(script.name, "--dry-run", "seed=3", PYTHON=python)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if script.name == "train_f.sh" else 1)
    for line in lines:
        words = line.split()
        assert words[0] == "srun"
        named = [word for word in words if word.startswith(("tools/", "configs/"))]
        assert named
        assert all((ROOT / word).is_file() for word in named), line
    # The tool reads what the ranks would read, and nothing else is run.
    commands = [line.split(python)[1].strip() for line in lines]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"{command} --print-config" for command in commands]
    assert all(command.endswith(" seed=3") for command in commands)


@pytest.mark.parametrize(
    ("script", "override", "sentence"),
    [
        ("train_s.sh", "seeds=2", "train.py: configs/published/cub200-s.yaml: seeds: unknown key"),
        ("tokenize_laion.sh", "sizes=3", "tokenize_shards.py: configs/tokenize/laion400m.yaml: sizes: unk"),
        ("eval_coco.sh", "sampling.step=3", "eval_coco_fid.py: the overrides: sampling.step: unknown key"),
    ],
)
def test_a_dry_run_names_a_mistake_in_the_configuration(script: str, override: str, sentence: str) -> None:
    done = run_script(script, "--dry-run", override, PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(sentence)


def test_a_dry_run_without_python_says_so() -> None:
    done = run_script("train_s.sh", "--dry-run", PYTHON="/nowhere/python")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "/nowhere/python: no such program; run make setup first, or set PYTHON\n"


@pytest.mark.parametrize(
    ("restarts", "status", "code", "calls"),
    [
        # F's second stage is read before its first one is started.
        ("0", 0, 0, [f"{PRETRAIN} --print-config", f"{FINETUNE} --print-config", PRETRAIN, FINETUNE]),
        ("0", 2, 2, [f"{PRETRAIN} --print-config"]),
        ("0", 1, 0, [f"{PRETRAIN} --print-config", PRETRAIN, FINETUNE]),
        ("1", 2, 0, [PRETRAIN, FINETUNE]),
    ],
    ids=["right", "mistaken", "another failure", "a later start"],
)
def test_a_job_reads_its_configurations_once_before_its_ranks(
    restarts: str, status: int, code: int, calls: list[str], tmp_path: Path
) -> None:
    """Without Slurm: its commands are stand-ins as well, and srun starts one rank."""
    stand_in(tmp_path, 'while [ "$1" != bash ]; do shift; done; exec "$@"', name="srun")
    stand_in(tmp_path, "echo n1", name="scontrol")
    said = 'echo "train.py: it is wrong." >&2'
    reads = f'case "$*" in *--print-config) {said}; exit {status} ;; esac'
    done = run_script(
        "train_f.sh",
        PYTHON=stand_in(tmp_path, f"{RECORDS}\n{reads}"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        LOGS=str(tmp_path / "logs"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="n1",
        SLURM_JOB_NUM_NODES="1",
        SLURM_PROCID="0",
        SLURM_RESTART_COUNT=restarts,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert "srun" not in done.stdout
    if code:
        assert done.stderr == "train.py: it is wrong.\n"
        assert done.stdout == ""
        assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_scripts_can_be_started_again_and_say_so_when_typed(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=USR2@", "--time=", "--output=slurm/logs/"):
        assert f"#SBATCH {line}" in text
    typed = run_script(script.name)
    assert typed.returncode == 2
    assert typed.stderr == (
        f"this is a job: sbatch slurm/{script.name}, or bash slurm/{script.name} --dry-run to see what would "
        "run\n"
    )
