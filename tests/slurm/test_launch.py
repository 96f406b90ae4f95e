"""`tools/launch.py` on a real cluster: submission, stop and restart by Submitit."""

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launch, losses
from tests.slurm.recipe import write_recipe
from tests.slurm.test_training import digest
from vqd_scale.core.signals import REQUEUE_EXIT_CODE

pytestmark = pytest.mark.slurm
TWO_NODES = ("--nodes", "2", "--hours", "0.15", "--signal-seconds", "60")


@pytest.fixture
def recipe(shapes_folder: Path, tmp_path: Path) -> Path:
    write_recipe(tmp_path, shapes_folder, tmp_path / "runs")
    return tmp_path / "pretrain.yaml"


def jobs_of(output: str) -> list[str]:
    return re.findall(r"job (\S+) \(slurm\)", output)


def test_stopped_and_restarted_training_equals_uninterrupted(
    cluster: Cluster, launch: Launch, recipe: Path, torchrun_runs: Path
) -> None:
    run = recipe.parent / "runs" / "pretrain"
    answer = launch(str(recipe), *TWO_NODES)
    assert answer.code == 0, answer.errors
    (job,) = jobs_of(answer.output)
    cluster.until(lambda: len(losses(run)) >= 30 or cluster.job(job).has_ended, why="30 steps")
    # Slurm's signal before a time limit; Submitit recognizes it by the elapsed time.
    cluster.run("scancel", "--signal=USR2", job)
    cluster.until(lambda: cluster.job(job).restarts == 1, why="a requeue")
    status = launch("status", str(run))
    assert f"train {job}: " in status.output
    assert "images seen" in status.output
    second = launch(str(recipe), *TWO_NODES)
    assert second.code == 2
    assert f"job {job} is " in second.errors
    # An edit now affects later launches only.
    (code,) = run.glob("jobs/*/code")
    assert (code / "vqd_scale" / "training" / "loop.py").is_file()
    ended = cluster.finished(job)
    log = Path(re.findall(r"its log is (\S+)", answer.output)[0])
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log.read_text()
    assert f"ended with exit code {REQUEUE_EXIT_CODE}; the job is queued again" in log.read_text()
    assert "resumed from the checkpoint at" in log.read_text()
    assert losses(run) == losses(torchrun_runs / "pretrain")
    assert digest(run) == digest(torchrun_runs / "pretrain")
    assert f"train {job}: done, 960 images seen" in launch("status", str(run)).output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--partition", "nowhere"), "invalid partition specified: nowhere"),
        (("data.path=/nowhere",), "/nowhere"),
        (("optim.lrr=1",), "optim.lrr: unknown key"),
    ],
)
def test_user_errors_exit_2_before_queueing(
    launch: Launch, recipe: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    answer = launch(str(recipe), *arguments)
    assert answer.code == 2
    assert sentence in answer.errors
    assert len(answer.errors.strip().splitlines()) == 1
    assert not (recipe.parent / "runs").exists()


def test_missing_configuration_exits_2(launch: Launch) -> None:
    answer = launch("/nowhere.yaml")
    assert answer.code == 2
    assert "/nowhere.yaml: the configuration file cannot be read" in answer.errors


def test_cancelled_launch_is_not_restarted(cluster: Cluster, launch: Launch, recipe: Path) -> None:
    run = recipe.parent / "runs" / "pretrain"
    answer = launch(str(recipe), *TWO_NODES)
    (job,) = jobs_of(answer.output)
    assert launch("cancel", str(run)).output == f"canceled: {job}\n"
    ended = cluster.finished(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert f"train {job}: canceled" in launch("status", str(run)).output
