"""The scripts that train, as `sbatch` starts them on a real cluster of two nodes."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import Submit, Submitted, losses

pytestmark = pytest.mark.slurm
STAGES = ("pretrain", "finetune")


def digest(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


def assert_is_the_undisturbed_run(submitted: Submitted, by_torchrun: Path, *stages: str) -> None:
    """To the bit: the same losses, each once, and the same exported weights."""
    for stage in stages:
        assert submitted.losses(stage) == losses(by_torchrun / stage)
        assert digest(submitted.run(stage)) == digest(by_torchrun / stage)


def test_f_trains_to_its_end_over_two_nodes_as_torchrun_does(submit: Submit, by_torchrun: Path) -> None:
    submitted = submit("train_f.sh")
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), submitted.log
    assert len(losses(by_torchrun / "pretrain")) == 40
    assert_is_the_undisturbed_run(submitted, by_torchrun, *STAGES)
    for stage in STAGES:
        config = yaml.safe_load((submitted.run(stage) / "config.yaml").read_text())
        assert config["engine"]["zero"]["stage"] == 3
        newest = max((submitted.run(stage) / "checkpoints").iterdir())
        assert json.loads((newest / "manifest.json").read_text())["ranks"] == 2
    # Every rank has a log of its own, and the job's says where.
    assert "trained on 320 images" in submitted.rank_log("finetune", 0)
    assert submitted.rank_log("finetune", 1).count("Traceback") == 0
    assert "on vqd[1-2], 2 ranks" in submitted.log
