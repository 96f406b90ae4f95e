"""`tools/launch.py` on a real cluster: what Submitit submits, stops and starts again."""

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
def recipe(embedded: Path, tmp_path: Path) -> Path:
    write_recipe(tmp_path, embedded, tmp_path / "runs")
    return tmp_path / "pretrain.yaml"


def jobs_of(said: str) -> list[str]:
    return re.findall(r"job (\S+) \(slurm\)", said)


def test_training_is_stopped_started_again_and_ends_as_undisturbed(
    cluster: Cluster, launch: Launch, recipe: Path, by_torchrun: Path
) -> None:
    run = recipe.parent / "runs" / "pretrain"
    done = launch(str(recipe), *TWO_NODES)
    assert done.code == 0, done.complained
    (job,) = jobs_of(done.said)
    cluster.until(lambda: len(losses(run)) >= 30 or cluster.job(job).has_ended, why="30 steps")
    # What Slurm sends before a time limit; Submitit counts it as that by the time that has gone by.
    cluster.run("scancel", "--signal=USR2", job)
    cluster.until(lambda: cluster.job(job).restarts == 1, why="a requeue")
    asked = launch("status", str(run))
    assert f"train {job}: " in asked.said
    assert "images seen" in asked.said
    # What is edited now concerns later launches only.
    (code,) = run.glob("jobs/*/code")
    assert (code / "vqd_scale" / "training" / "loop.py").is_file()
    ended = cluster.finished(job)
    log = Path(re.findall(r"its log is (\S+)", done.said)[0])
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log.read_text()
    assert f"ended with exit code {REQUEUE_EXIT_CODE}; the job is queued again" in log.read_text()
    assert "going on from the checkpoint at" in log.read_text()
    assert losses(run) == losses(by_torchrun / "pretrain")
    assert digest(run) == digest(by_torchrun / "pretrain")
    assert f"train {job}: done, 960 images seen" in launch("status", str(run)).said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--partition", "nowhere"), "invalid partition specified: nowhere"),
        (("data.path=/nowhere",), "/nowhere"),
        (("optim.lrr=1",), "optim.lrr: unknown key"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_queued(
    launch: Launch, recipe: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = launch(str(recipe), *arguments)
    assert done.code == 2
    assert sentence in done.complained
    assert len(done.complained.strip().splitlines()) == 1
    assert not (recipe.parent / "runs").exists()


def test_a_configuration_that_is_not_there(launch: Launch) -> None:
    done = launch("/nowhere.yaml")
    assert done.code == 2
    assert "/nowhere.yaml: the configuration file cannot be read" in done.complained


def test_a_launch_that_is_cancelled_does_not_come_back(
    cluster: Cluster, launch: Launch, recipe: Path
) -> None:
    run = recipe.parent / "runs" / "pretrain"
    done = launch(str(recipe), *TWO_NODES)
    (job,) = jobs_of(done.said)
    assert launch("cancel", str(run)).said == f"cancelled: {job}\n"
    ended = cluster.finished(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert f"train {job}: cancelled" in launch("status", str(run)).said
