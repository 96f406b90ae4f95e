"""Resume on M ranks in one ZeRO stage from N ranks in another, without a conversion."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vqd_scale.training.logging.metrics import read_metrics

pytestmark = pytest.mark.ranks
RunTool = Callable[..., "subprocess.CompletedProcess[str]"]
IMAGES, SAVED = 160, 80
RESIZED = [(1, 2), (2, 1), (2, 4), (4, 2)]
STAGED = [(1, 1), (3, 3), (3, 1), (1, 3)]
QUICK = {((2, 1), (3, 1)), ((1, 2), (1, 3))}
"""The cells of the matrix that `make test` runs: all four ways through both layouts."""


OPTIMIZERS = ["optim.kind=adamw", "optim={kind: lion, lr: 1e-5, warmup_images: 32}"]


@pytest.fixture(scope="module", params=OPTIMIZERS, ids=["adamw", "lion"])
def train(request: pytest.FixtureRequest, token_world: Path, run_tool: RunTool) -> Callable[..., None]:
    """Train with each optimizer; Lion steps by the sign even of gradients that are only rounding errors."""

    def run(run: Path, ranks: int, stage: int, images: int) -> None:
        overrides = [f"run={run}", f"total_images={images}", f"engine.zero.stage={stage}", request.param]
        # A constant rate: a schedule that ends with the run would differ for a shorter run.
        overrides += ["optim.schedule.kind=constant", "checkpoint.every_images=80"]
        completed = run_tool("train.py", str(token_world / "train.yaml"), *overrides, ranks=ranks)
        assert completed.returncode == 0, completed.stderr

    return run


@pytest.fixture(scope="module")
def saved(train: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Return the first half of the run by ranks and stage; each is trained once."""
    folder = tmp_path_factory.mktemp("saved")

    def get(ranks: int, stage: int) -> Path:
        run = folder / f"{ranks}-ranks-stage-{stage}"
        if not run.exists():
            train(run, ranks, stage, SAVED)
        return run

    return get


@pytest.fixture(scope="module")
def uninterrupted(train: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(run, 1, 3, IMAGES)
    return run


def weights(run: Path) -> Path:
    return run / "export" / "model.safetensors"


@pytest.mark.parametrize(
    ("ranks", "stages"),
    [
        pytest.param(ranks, stages, marks=[] if (ranks, stages) in QUICK else [pytest.mark.long])
        for ranks in RESIZED
        for stages in STAGED
    ],
)
def test_resume_on_other_ranks_in_another_stage(
    ranks: tuple[int, int],
    stages: tuple[int, int],
    saved: Callable[[int, int], Path],
    uninterrupted: Path,
    train: Callable[..., None],
    tmp_path: Path,
) -> None:
    shutil.copytree(saved(ranks[0], stages[0]), run := tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(saved(ranks[0], stages[0])), str(run)))
    train(run, ranks[1], stages[1], IMAGES)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["images"] for row in rows] == list(range(8, IMAGES + 1, 8))
    expected = [row["loss"] for row in read_metrics(uninterrupted / "metrics.jsonl")]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    # The export contains the EMA, which the checkpoint stores as well.
    resumed_weights, uninterrupted_weights = load_file(weights(run)), load_file(weights(uninterrupted))
    for name, tensor in resumed_weights.items():
        # A key's bias has only rounding errors as gradient, which AdamW scales up (see test_train).
        if not name.endswith(("key.bias", "in_proj_bias")):
            assert tensor.sub(uninterrupted_weights[name]).abs().max() < 1e-4, name
