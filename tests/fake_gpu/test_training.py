# pyright: reportPrivateUsage=false
"""A training step of every shipped configuration on a GPU without values: devices, dtypes, waits, bytes.

The step is that of the training loop, with plain AdamW in place of DeepSpeed. Configurations have two layers,
their own width, and the codes and grid of size B. Sizes B and L are whole.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.fake_gpu.twin import DEVICE, WORLD, FakeGPU, PlainEngine, fake_gpu, to_gpu
from tests.training.shipped_configs import (
    BATCH,
    ROOT,
    Inputs,
    configs_of,
    image_batch,
    layer_overrides,
    name_of,
    token_batch,
)
from vqd_scale.core.config import load_config
from vqd_scale.data.loading.batch import Batch
from vqd_scale.training import loop
from vqd_scale.training.memory import training_memory
from vqd_scale.training.tasks import gan_losses
from vqd_scale.training.tasks.base import Task
from vqd_scale.training.tasks.config import TOKEN_RUNS, TOKENIZER_RUNS, RefitConfig, TokenizerRun, TokenRun
from vqd_scale.training.tasks.refitting import RefitTask
from vqd_scale.training.tasks.tokenizer_task import TokenizerTask
from vqd_scale.training.validation import ValidationSet

FROZEN_ENCODER = {"tokenizers/autoencoder.py", "tokenizers/convolutions.py"}
"""The frozen part of a tokenizer that is refitted."""
ALONE = ["log.tensorboard=false", "validation=null", "sample_images=null"]
"""Overrides that leave the training step alone."""
CODES, GRID = 2887, (32, 32)
WAITS = 1
"""Host waits of a micro-batch, all of them in the training loop: one read of all that decides on the step."""
OPERATORS = {"published/coco.yaml": 3500, "l/pretrain.yaml": 7250}
"""Bounds of the operators of a step of the whole models."""
WIDE = {"text/clip.py", "tokenizers/perceptual.py", "training/tasks/gan_losses.py"}
"""Frozen networks, which compute in float32 in every run; the last has the gradients of LPIPS."""
MEMORY_TOLERANCE = 0.01
"""Largest difference of the memory model from the tracked peak of a whole model, as a fraction."""
REDUCED_TOLERANCE = 0.15
"""The same with two layers, where buffers of single operators count, which the model leaves out."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), CODES, GRID)


class NoCheckpoints:
    """Checkpoints of a run that starts and saves none."""

    def __init__(self, *_: object) -> None:
        """Ignore everything."""

    def resume(self, _: int | None) -> None:
        """Find no checkpoint."""

    def save(self, *_: object, must: bool) -> None:
        """Save nothing."""


def _return_none(*_: object) -> None:
    """Stand in for what needs a real device or data."""


@pytest.fixture(name="gpu")
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Generator[FakeGPU]:
    for module in (loop, gan_losses):
        monkeypatch.setattr(module, "Engine", PlainEngine)
    monkeypatch.setattr(loop, "Checkpoints", NoCheckpoints)
    monkeypatch.setattr(loop, "peak_flops", _return_none)
    monkeypatch.setattr(RefitTask, "init_weights", _return_none)
    with fake_gpu() as gpu:
        yield gpu


def trainer_of(task: Task[Any], config: TokenRun | TokenizerRun) -> Any:
    """A training loop between two steps, without checkpoints and data."""
    to_gpu(task.module, config.engine)
    trainer: Any = loop._Trainer(task, config, WORLD, Mock())
    return trainer


def step(trainer: Any, batch: Batch, images: int) -> None:
    """All that the loop does for every batch."""
    trainer.images = images
    trainer._step(batch)
    trainer.ema.update(images + BATCH, BATCH)
    trainer.task.on_step_end(images + BATCH)


def check_validation(gpu: FakeGPU, trainer: Any, batch: Batch) -> None:
    """Validate two batches with the EMA weights, with one wait for the metrics."""
    validation: Any = object.__new__(ValidationSet)
    validation.__dict__ |= {"_task": trainer.task, "_world": WORLD, "_batches": [batch, batch]}
    gpu.reset()
    with trainer.ema.in_place_of_weights():
        validation.metrics(trainer.engine)
    assert sum(gpu.waits.values()) == 1, gpu.waits


def token_run(path: Path, inputs: Inputs, folder: Path, *overrides: str) -> TokenRun:
    shipped = load_config(TOKEN_RUNS, path)
    return load_config(
        TOKEN_RUNS,
        path,
        [
            f"run={folder}",
            f"tokenizer={inputs.tokenizer}",
            f"data.path={inputs.token_shards(shipped.text)}",
            f"data.global_batch_size={BATCH}",
            "init_from=null",
            "embedding_init_std=0",
            *ALONE,
            *inputs.text_overrides(shipped.text),
            *overrides,
        ],
    )


def token_trainer(config: TokenRun) -> Any:
    with torch.device(DEVICE):
        task = config.build(WORLD)
    return trainer_of(task, config)


def check_step(gpu: FakeGPU, trainer: Any, batch: Batch, images: int = 0, micro_batches: int = 1) -> None:
    """Make a step and check its waits and dtypes."""
    gpu.reset()
    step(trainer, batch, images)
    assert sum(gpu.waits.values()) <= WAITS * micro_batches, gpu.waits
    if trainer.config.engine.precision == "bf16":
        # A tokenizer selects its codes in float32, by matrix products.
        name = "convolution" if isinstance(trainer.task, TokenizerTask) else ""
        wide = {place.file for place in gpu.wide_products if name in place.operator}
        frozen = FROZEN_ENCODER if isinstance(trainer.task, RefitTask) else set[str]()
        assert wide <= WIDE | frozen, gpu.wide_products
        trained = [value for value in trainer.task.module.parameters() if value.requires_grad]
        assert {value.dtype for value in trained} == {torch.bfloat16}


def check_memory(gpu: FakeGPU, config: TokenRun, tolerance: float = REDUCED_TOLERANCE) -> None:
    """Compare the memory model with the tracked peak of the last step."""
    # The model traces on the device meta, which the twin takes for the GPU.
    peak = gpu.peak
    model = training_memory(config, CODES, GRID, BATCH)
    assert model.total == pytest.approx(peak, rel=tolerance), model


@pytest.mark.parametrize("path", configs_of("token run"), ids=name_of)
def test_step_of_a_token_run(path: Path, inputs: Inputs, gpu: FakeGPU, tmp_path: Path) -> None:
    config = token_run(path, inputs, tmp_path, *layer_overrides(load_config(TOKEN_RUNS, path)))
    trainer = token_trainer(config)
    batch = token_batch(trainer.task)
    check_step(gpu, trainer, batch)
    check_memory(gpu, config)
    check_validation(gpu, trainer, batch)


@pytest.mark.parametrize("path", configs_of("tokenizer run"), ids=name_of)
def test_step_of_a_tokenizer_run(path: Path, inputs: Inputs, gpu: FakeGPU, tmp_path: Path) -> None:
    """At the run's start, and at its end, when the codebook and the discriminator have joined."""
    shipped = load_config(TOKENIZER_RUNS, path)
    overrides = [f"run={tmp_path}", f"data.global_batch_size={BATCH}", *ALONE]
    overrides += inputs.lpips_overrides(shipped)
    if isinstance(shipped, RefitConfig):
        overrides.append(f"tokenizer={inputs.refitted_tokenizer(shipped)}")
    config = load_config(TOKENIZER_RUNS, path, overrides)
    trainer = trainer_of(config.build(WORLD), config)
    batch = image_batch(config.transform.size)
    for images in (0, config.total_images - BATCH):
        check_step(gpu, trainer, batch, images)
    check_validation(gpu, trainer, batch)


@pytest.mark.parametrize(
    ("size", "precision", "checkpointing"),
    [("S", "bf16", True), ("B", "fp32", False), ("3B", "fp32", True), ("3B", "bf16", False)],
)
def test_sizes_in_both_precisions(
    size: str, precision: str, checkpointing: bool, inputs: Inputs, gpu: FakeGPU, tmp_path: Path
) -> None:
    path = ROOT / "configs/published/coco.yaml"
    keys = [f"denoiser.size={size}", "denoiser.layers=2", f"engine.precision={precision}"]
    keys.append(f"denoiser.gradient_checkpointing={str(checkpointing).lower()}")
    config = token_run(path, inputs, tmp_path, *keys)
    trainer = token_trainer(config)
    check_step(gpu, trainer, token_batch(trainer.task))
    check_memory(gpu, config)


def test_waits_once_per_micro_batch(inputs: Inputs, gpu: FakeGPU, tmp_path: Path) -> None:
    path = ROOT / "configs/published/cub200-s.yaml"
    config = token_run(path, inputs, tmp_path, "denoiser.layers=2", "engine.gradient_accumulation_steps=2")
    trainer = token_trainer(config)
    check_step(gpu, trainer, token_batch(trainer.task), micro_batches=2)
    assert {place.file for place in gpu.waits} == {"training/loop.py"}


@pytest.mark.parametrize("name", OPERATORS)
def test_whole_models_stay_within_operators_and_memory(
    name: str, inputs: Inputs, gpu: FakeGPU, tmp_path: Path
) -> None:
    config = token_run(ROOT / "configs" / name, inputs, tmp_path)
    trainer = token_trainer(config)
    check_step(gpu, trainer, token_batch(trainer.task))
    assert sum(gpu.operators.values()) <= OPERATORS[name], gpu.operators
    check_memory(gpu, config, MEMORY_TOLERANCE)
