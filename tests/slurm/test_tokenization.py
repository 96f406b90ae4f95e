"""An array of jobs that share the shards of one dataset, one of them killed during a write."""

import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Launch, Submit
from tests.slurm.test_launch import jobs_of
from tests.slurm.test_scripts import stub_tool
from vqd_scale.data.shards.shard_index import ShardSet

pytestmark = pytest.mark.slurm
WORKERS = 4

# A shard is flushed before it is renamed: at that moment it is complete but not yet valid.
KILLED_MID_SHARD = f"""
if [ "$SLURM_ARRAY_TASK_ID" = 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then
    exec {sys.executable} -c '
import os, runpy, signal, sys
flush = os.fsync
def dying_flush(descriptor):
    if ".tar.vqd-" in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)
os.fsync = dying_flush
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
' "$@"
fi
exec {sys.executable} "$@"
"""


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of a complete dataset's tars from its index."""
    return {shard.path.name: shard.sha256 for shard in ShardSet.open(folder).shards}


def test_array_of_four_with_a_killed_task_writes_equal_shards(submit: Submit, shapes_folder: Path) -> None:
    out, cluster = submit.folder / "tokens", submit.cluster
    submitted = submit(
        "tokenize_laion.sh",
        f"output={out}",
        options=("--nodes=1", f"--array=0-{WORKERS - 1}", f"--output={submit.folder / 'job-%a.log'}"),
        CONFIG=str(shapes_folder / "tokenize-train.yaml"),
        PYTHON=stub_tool(submit.folder, KILLED_MID_SHARD),
    )
    for worker in range(WORKERS):
        job = cluster.finished(f"{submitted.number}_{worker}")
        log = (submit.folder / f"job-{worker}.log").read_text()
        assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, int(worker == 2)), log
    assert digests(out) == digests(shapes_folder / "tokens" / "train")
    assert not list(out.glob(".*.partial"))


def test_launch_through_submitit(submit: Submit, launch: Launch, shapes_folder: Path) -> None:
    out = submit.folder / "tokens"
    config = str(shapes_folder / "tokenize-train.yaml")
    answer = launch("tokenize", config, f"output={out}", "--num-workers", "2")
    assert answer.code == 0, answer.errors
    for job in jobs_of(answer.output):
        assert submit.cluster.finished(job).state == "COMPLETED"
    assert digests(out) == digests(shapes_folder / "tokens" / "train")
