"""First forward and backward of every shipped training configuration, at its own precision and width.

One rank of the real engine, random weights, two samples, two layers. ``pytest -s`` prints a table of all
first losses at the end.
"""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.training.shipped_configs import (
    BATCH,
    CONFIGS,
    KIND_OF,
    Inputs,
    configs_of,
    image_batch,
    layer_overrides,
    name_of,
    token_batch,
)
from vqd_scale.core.config import load_config
from vqd_scale.core.world import join_world, leave_world
from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.training.engine import Engine
from vqd_scale.training.tasks.config import (
    TOKEN_RUNS,
    TOKENIZER_RUNS,
    RefitConfig,
    TokenizerRun,
    TokenRun,
)

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Result:
    """First step of a configuration.

    Attributes:
        kind: Of the run.
        precision: That the engine computed in.
        parameters: Number of trained parameters of the reduced model.
        loss: First loss, mean of the batch.
        last_loss: Loss at the end of the run's schedule, for a run whose losses change while it trains.
    """

    kind: str
    precision: str
    parameters: int
    loss: float
    last_loss: float | None = None


@pytest.fixture(scope="module")
def results() -> Generator[dict[Path, Result]]:
    """Results by configuration; printed when all tests are done."""
    rows: dict[Path, Result] = {}
    yield rows
    print(
        f"\n{'configuration':<40} {'kind':<15} {'precision':<9} {'parameters':>11} {'first loss':>10}  last"
    )
    for path, row in sorted(rows.items()):
        last = "" if row.last_loss is None else f"{row.last_loss:.4f}"
        columns = f"{row.kind:<15} {row.precision:<9} {row.parameters:>11,} {row.loss:>10.4f}"
        print(f"{name_of(path):<40} {columns}  {last}".rstrip())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


class FirstStep:
    """An engine around a task's module, and whether each gradient of it is finite.

    Args:
        task: The task.
        config: The run.
    """

    def __init__(self, task: Any, config: TokenRun | TokenizerRun) -> None:
        self.task = task
        self.config = config
        self.finite: dict[str, bool] = {}
        self.trained = {name: value.numel() for name, value in _trained(task.module)}
        for name, value in _trained(task.module):
            value.register_hook(functools.partial(self._note, name))
        self.engine = Engine(task.module, config.engine, config.optim, BATCH, task.world, task.units)

    def loss(self, batch: TokenBatch | ImageBatch, images: int = 0) -> float:
        """Forward and backward, with a check that the loss and every gradient are finite."""
        self.finite.clear()
        losses = self.task.losses(self.engine, batch, images)
        assert losses.per_sample.shape == (BATCH,)
        assert losses.per_sample.isfinite().all(), losses.per_sample
        self.engine.backward(losses.per_sample.mean())
        assert self.finite.keys() == self.trained.keys()
        assert [name for name, is_finite in self.finite.items() if not is_finite] == []
        return float(losses.per_sample.detach().mean())

    def result(self, kind: str, loss: float, last_loss: float | None = None) -> Result:
        return Result(kind, self.config.engine.precision, sum(self.trained.values()), loss, last_loss)

    def _note(self, name: str, gradient: Tensor) -> None:
        self.finite[name] = bool(gradient.isfinite().all())


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


@pytest.fixture(autouse=True)
def world() -> Generator[None]:
    """A world of one rank, left after each test: DeepSpeed keeps what belongs to it."""
    yield
    leave_world()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_configuration_has_one_kind(path: Path) -> None:
    assert len(KIND_OF[path]) == 1, KIND_OF[path]


@pytest.mark.parametrize("path", configs_of("token run"), ids=name_of)
def test_first_step_of_a_token_run_is_finite(
    path: Path, inputs: Inputs, results: dict[Path, Result], tmp_path: Path
) -> None:
    shipped = load_config(TOKEN_RUNS, path)
    overrides = [
        f"run={tmp_path}",
        f"tokenizer={inputs.tokenizer}",
        "init_from=null",
        f"data.global_batch_size={BATCH}",
    ]
    overrides += [f"data.path={inputs.token_shards(shipped.text)}"]
    config = load_config(
        TOKEN_RUNS, path, [*overrides, *layer_overrides(shipped), *inputs.text_overrides(shipped.text)]
    )

    task = config.build(join_world())
    step = FirstStep(task, config)
    results[path] = step.result(config.kind, step.loss(token_batch(task)))


@pytest.mark.parametrize("path", configs_of("tokenizer run"), ids=name_of)
def test_first_step_of_a_tokenizer_run_is_finite(
    path: Path, inputs: Inputs, results: dict[Path, Result], tmp_path: Path
) -> None:
    """At the run's start, and at its end, when the codebook and the discriminator have joined."""
    shipped = load_config(TOKENIZER_RUNS, path)
    size = min(IMAGE_SIZE, shipped.transform.size)
    overrides = [f"run={tmp_path}", f"data.global_batch_size={BATCH}", f"transform.size={size}"]
    overrides += inputs.lpips_overrides(shipped)
    if isinstance(shipped, RefitConfig):
        overrides.append(f"tokenizer={inputs.refitted_tokenizer(shipped)}")
    else:
        overrides.append("vqgan.num_res_blocks=1")
    config = load_config(TOKENIZER_RUNS, path, overrides)

    step = FirstStep(config.build(join_world()), config)
    first = step.loss(image_batch(size))
    assert step.engine.step(1e-6)
    results[path] = step.result(config.kind, first, step.loss(image_batch(size), config.total_images - 1))
