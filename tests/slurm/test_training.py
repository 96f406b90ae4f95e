"""The training scripts on two nodes, started by `sbatch`, with failures."""

import hashlib
import json
import re
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import NODES_ARE_CHECKED_EVERY
from tests.slurm.conftest import Submit, Submitted, losses
from tests.slurm.recipe import FINETUNED, PRETRAINED
from vqd_scale.core.signals import HUNG_EXIT_CODE, REQUEUE_EXIT_CODE

pytestmark = pytest.mark.slurm
STAGES = ("pretrain", "finetune")


def digest(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


def assert_equals_uninterrupted(submitted: Submitted, torchrun_runs: Path, *stages: str) -> None:
    """Compare bitwise: each loss once, and the exported weights."""
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), submitted.log
    for stage in stages:
        assert submitted.losses(stage) == losses(torchrun_runs / stage)
        assert digest(submitted.run(stage)) == digest(torchrun_runs / stage)


def test_f_on_two_nodes_equals_torchrun(submit: Submit, torchrun_runs: Path) -> None:
    submitted = submit("train_f.sh")
    assert_equals_uninterrupted(submitted, torchrun_runs, *STAGES)
    assert submitted.cluster.job(submitted.number).restarts == 0
    assert len(losses(torchrun_runs / "pretrain")) == PRETRAINED // 8
    for stage in STAGES:
        config = yaml.safe_load((submitted.run(stage) / "config.yaml").read_text())
        assert config["engine"]["zero"]["stage"] == 3
        newest = max((submitted.run(stage) / "checkpoints").iterdir())
        assert json.loads((newest / "manifest.json").read_text())["ranks"] == 2
    # Every rank has its own log, which the job's log names.
    assert f"trained on {FINETUNED} images" in submitted.rank_log("finetune", 0)
    assert submitted.rank_log("finetune", 1).count("Traceback") == 0
    assert "on vqd[1-2], 2 ranks" in submitted.log


def test_manual_requeue_and_kills_in_turn(submit: Submit, torchrun_runs: Path) -> None:
    submitted = submit("train_b.sh")
    submitted.until_steps("pretrain", 30)
    submitted.cluster.run("scontrol", "requeue", submitted.number)
    submitted.until_steps("pretrain", len(submitted.losses("pretrain")) + 30)
    # One job step is killed, as by the kernel when memory runs out.
    submitted.cluster.run("scancel", "--signal=KILL", submitted.step())
    assert_equals_uninterrupted(submitted, torchrun_runs, "pretrain")
    assert submitted.cluster.job(submitted.number).restarts == 2
    assert "train: ended with exit code 137; the job is queued again" in submitted.log


def test_time_limit_signal_saves_and_requeues(submit: Submit, torchrun_runs: Path) -> None:
    # After the initial save only the signal saves, since no period ends.
    submitted = submit("train_b.sh", "checkpoint.every_images=1000000", options=("--signal=USR2@120",))
    cluster = submit.cluster

    def limit(key: str, value: str) -> bool:
        update = ("scontrol", "update", f"JobId={submitted.number}", f"{key}={value}")
        return cluster.run(*update, check=False).returncode == 0

    submitted.until_steps("pretrain", 30)
    # The run would end before Slurm checks its time limit again.
    with cluster.frozen(f"{sys.executable} tools/train.py"):
        ends = (datetime.now() + timedelta(seconds=90)).strftime("%Y-%m-%dT%H:%M:%S")
        assert limit("EndTime", ends)
        time.sleep(NODES_ARE_CHECKED_EVERY + 3)
    cluster.until(lambda: cluster.job(submitted.number).restarts >= 1, why="a requeue")
    # Its restart is counted before it is queued: until then its limit is that of a job which has ended. On a
    # fast machine the restarted job may be done by now.
    cluster.until(
        lambda: limit("TimeLimit", "10") or cluster.job(submitted.number).has_ended, 60, "another time limit"
    )
    assert f"train: ended with exit code {REQUEUE_EXIT_CODE}; the job is queued again" in submitted.log
    assert_equals_uninterrupted(submitted, torchrun_runs, "pretrain")
    saved = re.search(r"resumed from the checkpoint at (\d+) images", submitted.rank_log("train", 0))
    assert saved is not None
    assert int(saved[1]) >= 8 * 30


def test_network_cut_ends_the_other_nodes_with_stacks(submit: Submit, torchrun_runs: Path) -> None:
    submitted, cluster = submit("train_b.sh", "health.hang_seconds=30"), submit.cluster
    submitted.until_steps("pretrain", 30)
    cluster.freeze("vqd2")
    stacks = submitted.run("pretrain") / "stacks-00000.txt"
    cluster.until(stacks.exists, 90, "the watchdog of the rank that is left")
    cluster.until(lambda: cluster.job(submitted.number).restarts >= 1, 120, "a requeue")
    # Slurm marks the node as down, and the test restarts it.
    cluster.lose("vqd2")
    cluster.start("vqd2")
    assert_equals_uninterrupted(submitted, torchrun_runs, "pretrain")
    assert "no progress for" in submitted.rank_log("train", 0)
    assert "_step" in stacks.read_text()
    assert (submitted.folder / "logs" / submitted.number / "train-ends-0" / "0").read_text() == (
        f"{HUNG_EXIT_CODE}\n"
    )


def test_run_resumes_on_fewer_nodes(submit: Submit, torchrun_runs: Path) -> None:
    submitted, cluster = submit("train_b.sh", options=("--nodes=1-2",)), submit.cluster
    submitted.until_steps("pretrain", 30)
    assert cluster.job(submitted.number).nodes == "vqd[1-2]"
    cluster.lose("vqd2")
    try:
        job = cluster.finished(submitted.number)
    finally:
        cluster.start("vqd2")
    assert (job.state, job.exit_code, job.nodes) == ("COMPLETED", 0, "vqd1"), submitted.log
    assert job.restarts >= 1
    # One rank sums in another order than two.
    assert submitted.losses("pretrain") == pytest.approx(losses(torchrun_runs / "pretrain"), rel=1e-4)
