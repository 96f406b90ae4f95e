import os
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, slurm_cluster
from tests.slurm.recipe import write_recipe
from vqd_scale.training.logging.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ONE_RANK_PER_NODE = ("--gpus-per-node=1", "--cpus-per-gpu=1", "--time=10")


@pytest.fixture(scope="session")
def cluster() -> Generator[Cluster]:
    """Real Slurm cluster of two nodes."""
    with slurm_cluster(nodes=2) as running:
        yield running


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with shards, tokenizer and tokens of the shapes dataset."""
    folder = tmp_path_factory.mktemp("embedded")
    completed = subprocess.run(
        [sys.executable, "-m", "tests.slurm.shapes_pipeline", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return folder


@pytest.fixture(scope="session")
def torchrun_runs(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of F's two runs, uninterrupted, by torchrun on this machine."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_recipe(folder, shapes_folder, folder / "runs")
    for stage in ("pretrain", "finetune"):
        completed = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
                *("--master-port", "29417", "tools/train.py", str(folder / f"{stage}.yaml")),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr
    return folder / "runs"


@dataclass
class Submitted:
    """Job of a script in ``slurm/``.

    Attributes:
        cluster: Its cluster.
        number: The job's.
        folder: Of its configurations, runs and logs.
    """

    cluster: Cluster
    number: str
    folder: Path

    @property
    def log(self) -> str:
        """Return the output of the job's script, over all of its starts."""
        return (self.folder / "job.log").read_text()

    def rank_log(self, stage: str, rank: int) -> str:
        """Return the output of a rank."""
        return (self.folder / "logs" / self.number / f"{stage}-rank-{rank}.log").read_text()

    def run(self, stage: str) -> Path:
        """Return a stage's run folder."""
        return self.folder / "runs" / stage

    def losses(self, stage: str) -> list[float]:
        """Return the losses of a stage so far."""
        return losses(self.run(stage))

    def step(self) -> str:
        """Return the running job step, by the name that ``scancel`` takes."""
        listed = self.cluster.run("squeue", "--steps", "--noheader", "--format=%i", "--jobs", self.number)
        return next(name for name in listed.stdout.split() if name.rpartition(".")[2].isdigit())

    def until_steps(self, stage: str, steps: int) -> None:
        """Wait until a stage has made this number of steps."""
        self.cluster.until(
            lambda: len(self.losses(stage)) >= steps or self.cluster.job(self.number).has_ended,
            why=f"{steps} steps of {stage}",
        )


def losses(run: Path) -> list[float]:
    """Return a run's losses; every step of these runs writes a row."""
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@dataclass(frozen=True)
class Answer:
    """Exit code, standard output and standard error of ``tools/launch.py``."""

    code: int
    output: str
    errors: str


Launch = Callable[..., Answer]


@pytest.fixture
def launch(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Launch:
    """Function that runs ``tools/launch.py`` in this process."""
    from vqd_scale.cli.launch import main

    monkeypatch.chdir(ROOT)
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str) -> Answer:
        code = 0
        try:
            main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@dataclass
class Submit:
    """Submission of the scripts in ``slurm/`` with small configurations, one rank on each of two nodes.

    Attributes:
        cluster: Target cluster.
        folder: For configurations, runs and logs.
    """

    cluster: Cluster
    folder: Path

    def __call__(
        self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str
    ) -> Submitted:
        """Submit a script with these arguments, options of ``sbatch`` and variables."""
        settings = {
            "CONFIGS": str(self.folder),
            "CONFIG": str(self.folder / "pretrain.yaml"),
            "LOGS": str(self.folder / "logs"),
            "PYTHON": sys.executable,
        }
        sbatch_options = ["--nodes=2", *ONE_RANK_PER_NODE, f"--output={self.folder / 'job.log'}", *options]
        number = self.cluster.submit(*sbatch_options, f"slurm/{script}", *arguments, **settings | variables)
        return Submitted(self.cluster, number, self.folder)


@pytest.fixture
def submit(
    cluster: Cluster, shapes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[Submit]:
    """Submission from the project's top folder; jobs are canceled after the test."""
    monkeypatch.chdir(ROOT)
    write_recipe(tmp_path, shapes_folder, tmp_path / "runs")
    cluster.until(lambda: all(cluster.state(name) == "idle" for name in cluster.names), why="idle nodes")
    yield Submit(cluster, tmp_path)
    cluster.run("scancel", "--user=root")
