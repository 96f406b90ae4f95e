"""The scripts' handling of failing jobs, with a stub tool, and their output."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Submit, Submitted

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if "\n#SBATCH --" in path.read_text()]


READS_CONFIG = 'case "$*" in *--print-config) exit 0 ;; esac'
"""What a stand-in for ranks does when the job only reads its configuration."""


def stub_tool(folder: Path, body: str, *, name: str = "stand-in") -> str:
    """Return a program in place of python that gets the tool and its arguments."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def stub_ranks(folder: Path, body: str) -> str:
    """Return such a program for ranks only, which reads no configuration."""
    return stub_tool(folder, f"{READS_CONFIG}\n{body}")


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
def test_restarts_are_counted_and_limited(submit: Submit) -> None:
    submitted = submit("train_f.sh", MAX_REQUEUES="1", PYTHON=stub_ranks(submit.folder, "exit 75"))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 1)
    assert submitted.log.count("the job is queued again") == 1
    assert "after all 1 restarts that MAX_REQUEUES allows" in submitted.log.splitlines()[-1]
    assert "finetune" not in submitted.log


@pytest.mark.slurm
def test_start_that_fails_twice_without_progress_is_not_repeated(submit: Submit) -> None:
    body = '[ "${SLURM_RESTART_COUNT:-0}" != 1 ] || touch "$VQD_PROGRESS_FILE"; exit 127'
    submitted = submit("train_b.sh", PYTHON=stub_ranks(submit.folder, body))
    job = submitted.cluster.finished(submitted.number)
    # Start 2 made progress, so that only starts 3 and 4 are alike.
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 127, 3), submitted.log
    assert "train: ended twice with exit code 127 before any progress" in submitted.log.splitlines()[-1]


@pytest.mark.slurm
def test_only_the_failed_task_of_an_array_is_requeued(submit: Submit) -> None:
    """The failing task is the one whose number is the array's own."""
    body = f"""
task=$SLURM_ARRAY_TASK_ID
echo "$MASTER_PORT" >> {submit.folder}/starts-$task
[ "$SLURM_JOB_ID" != "$SLURM_ARRAY_JOB_ID" ] || [ "$(wc -l < {submit.folder}/starts-$task)" -gt 1 ] || exit 75
"""
    # Of the environment only this: the ranks get PATH from the script.
    listed = f"--export=LOGS={submit.folder / 'logs'},PYTHON={stub_ranks(submit.folder, body)}"
    submitted = submit("tokenize_laion.sh", options=("--nodes=1", "--array=0-2", listed))
    jobs = [submitted.cluster.finished(f"{submitted.number}_{task}") for task in range(3)]
    assert [job.state for job in jobs] == ["COMPLETED"] * 3, submitted.log
    starts = [(submit.folder / f"starts-{task}").read_text().split() for task in range(3)]
    assert sorted(map(len, starts)) == [1, 1, 2]
    (ports,) = (ports for ports in starts if len(ports) == 2)
    assert len(set(ports)) == 2


@pytest.mark.slurm
def test_finished_stage_is_not_restarted(submit: Submit) -> None:
    fails_once = 'case "$2" in *finetune*) [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 76 ;; esac'
    submitted = submit("train_f.sh", PYTHON=stub_ranks(submit.folder, fails_once))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), submitted.log
    assert submitted.log.count("pretrain: start") == 1
    assert "pretrain: done by an earlier start of this job" in submitted.log
    assert submitted.log.count("finetune: start") == 2


@pytest.mark.slurm
def test_user_error_of_one_rank_is_reported_and_not_retried(submit: Submit) -> None:
    """The reported rank is the failing one, although terminated ranks have higher exit codes."""
    body = 'if [ "$SLURM_PROCID" = 1 ]; then echo "data: it is gone." >&2; exit 2; fi; sleep 100'
    submitted = submit("train_b.sh", PYTHON=stub_ranks(submit.folder, body))
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


def job_of_waiting_ranks(submit: Submit) -> Submitted:
    """Submit a job of two ranks that save on a stop signal."""
    submitted = submit("train_b.sh", options=("--exclusive",), PYTHON=stub_ranks(submit.folder, SAVES))
    ready = [submit.folder / f"ready-{rank}" for rank in (0, 1)]
    submitted.cluster.until(lambda: all(path.exists() for path in ready), why="both ranks")
    return submitted


@pytest.mark.slurm
def test_preempted_job_requeues_and_resumes(submit: Submit) -> None:
    submitted = job_of_waiting_ranks(submit)
    urgent = submitted.cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    assert submitted.cluster.finished(urgent).state == "COMPLETED"
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1)
    assert "train: ended with exit code 75; the job is queued again" in submitted.log


@pytest.mark.slurm
def test_cancelled_job_is_not_restarted(submit: Submit) -> None:
    submitted = job_of_waiting_ranks(submit)
    submitted.cluster.run("scancel", submitted.number)
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert "queued again" not in submitted.log


@pytest.mark.slurm
def test_configuration_error_ends_job_before_its_ranks(submit: Submit) -> None:
    submitted = submit("train_b.sh", options=("--nodes=1",), CONFIG="/nowhere.yaml")
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), submitted.log
    (sentence,) = submitted.log.splitlines()
    assert "/nowhere.yaml: the configuration file cannot be read" in sentence
    assert not (submitted.folder / "logs").exists()


@pytest.mark.slurm
def test_user_errors_of_ranks_are_one_sentence(submit: Submit) -> None:
    submitted = submit("train_b.sh", "data.path=/nowhere", options=("--nodes=1",))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), submitted.log
    assert "/nowhere" in submitted.log.splitlines()[-1]
    assert "Traceback" not in submitted.rank_log("train", 0)
    assert not submitted.run("pretrain").exists()


@pytest.mark.slurm
def test_unknown_partition_is_refused(submit: Submit) -> None:
    with pytest.raises(RuntimeError, match="invalid partition specified: nowhere"):
        submit("train_b.sh", options=("--partition=nowhere",))
    assert not (submit.folder / "logs").exists()


PRETRAIN, FINETUNE = (f"tools/train.py configs/f/{name}.yaml" for name in ("pretrain", "finetune"))
RECORDS = 'echo "$@" >> "$(dirname "$0")/calls"'


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_dry_run_prints_commands(script: Path, tmp_path: Path) -> None:
    python = stub_tool(tmp_path, f"{RECORDS}\necho seed: 3")
    completed = run_script(script.name, "--dry-run", "seed=3", PYTHON=python)
    assert completed.returncode == 0, completed.stderr
    lines = completed.stdout.splitlines()
    assert len(lines) == (2 if script.name == "train_f.sh" else 1)
    for line in lines:
        words = line.split()
        assert words[0] == "srun"
        named = [word for word in words if word.startswith(("tools/", "configs/"))]
        assert named
        assert all((ROOT / word).is_file() for word in named), line
    # Only the tool runs, and it reads the ranks' configuration.
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
def test_dry_run_reports_configuration_error(script: str, override: str, sentence: str) -> None:
    completed = run_script(script, "--dry-run", override, PYTHON=sys.executable)
    assert (completed.returncode, completed.stdout) == (2, "")
    (line,) = completed.stderr.splitlines()
    assert line.startswith(sentence)


def test_dry_run_without_python_exits_2() -> None:
    completed = run_script("train_s.sh", "--dry-run", PYTHON="/nowhere/python")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert completed.stderr == "/nowhere/python: no such program; run make setup first, or set PYTHON\n"


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
def test_job_validates_configuration_once_before_its_ranks(
    restarts: str, status: int, code: int, calls: list[str], tmp_path: Path
) -> None:
    """Run without Slurm: stubs replace its commands, and srun starts one rank."""
    stub_tool(tmp_path, 'while [ "$1" != bash ]; do shift; done; exec "$@"', name="srun")
    stub_tool(tmp_path, "echo n1", name="scontrol")
    print_error = 'echo "train.py: it is wrong." >&2'
    reads = f'case "$*" in *--print-config) {print_error}; exit {status} ;; esac'
    completed = run_script(
        "train_f.sh",
        PYTHON=stub_tool(tmp_path, f"{RECORDS}\n{reads}"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        LOGS=str(tmp_path / "logs"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="n1",
        SLURM_JOB_NUM_NODES="1",
        SLURM_PROCID="0",
        SLURM_RESTART_COUNT=restarts,
    )
    assert completed.returncode == code, completed.stderr
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert "srun" not in completed.stdout
    if code:
        assert completed.stderr == "train.py: it is wrong.\n"
        assert completed.stdout == ""
        assert not (tmp_path / "logs").exists()


def test_port_in_use_is_skipped_and_the_users_is_kept(tmp_path: Path) -> None:
    stub_tool(tmp_path, "echo n1", name="scontrol")

    def rendezvous(**variables: str) -> str:
        completed = subprocess.run(
            ["bash", "-euc", 'source slurm/env.sh; echo "$MASTER_ADDR:$MASTER_PORT"'],
            cwd=ROOT,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return completed.stdout.strip()

    first = rendezvous(SLURM_JOB_ID="7")
    assert first.startswith("n1:")
    port = int(first.removeprefix("n1:"))
    with socket.create_server(("", port)):
        assert int(rendezvous(SLURM_JOB_ID="7").removeprefix("n1:")) > port
    assert rendezvous(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1") != first
    users = {"MASTER_ADDR": "n2", "MASTER_PORT": "4711"}
    assert rendezvous(SLURM_JOB_ID="7", **users) == "n2:4711"
    assert rendezvous(SLURM_JOB_ID="7", RENDEZVOUS_OF_JOB="6", **users) == first


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_scripts_are_restartable_and_print_usage(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=USR2@", "--time=", "--output=slurm/logs/"):
        assert f"#SBATCH {line}" in text
    typed = run_script(script.name)
    assert typed.returncode == 2
    assert typed.stderr == (
        f"this is a job: sbatch slurm/{script.name}, or bash slurm/{script.name} --dry-run to see what would "
        "run\n"
    )
