"""A run folder belongs to one run: some settings may change on resume, others are refused."""

import json
from pathlib import Path

import pytest

from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.training.loop import _lock_run_folder  # pyright: ignore[reportPrivateUsage]
from vqd_scale.training.tasks.config import TrainConfig

BASE = ["tokenizer=t", "data.path=d", "total_images=1000", "diffusion.kind=paper"]


def claim(run: Path, *overrides: str) -> None:
    _lock_run_folder(run, load_config(TrainConfig, None, [*BASE, f"run={run}", *overrides]))


@pytest.mark.parametrize(
    "change",
    [
        "total_images=2000",
        "engine.zero.stage=1",
        "engine.zero.offload_optimizer=true",
        "engine.gradient_accumulation_steps=2",
        "engine.compile=true",
        "engine.deterministic=true",
        "denoiser.attention=sdpa",
        "denoiser.gradient_checkpointing=true",
        "data.num_workers=3",
        "data.ranged_reads.buffer_megabytes=9",
        "checkpoint.keep_last=9",
        "log.tensorboard=true",
        "health.nonfinite_gradient=skip",
        "validation.path=h",
    ],
)
def test_resume_accepts_changed_operational_settings(tmp_path: Path, change: str) -> None:
    claim(tmp_path)
    claim(tmp_path, change)
    claim(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("denoiser.width=512", "denoiser.width"),
        ("diffusion.steps=50", "diffusion.steps"),
        ("diffusion.kind=released", "diffusion.kind"),
        ("tokenizer=u", "tokenizer"),
        ("data.global_batch_size=64", "data.global_batch_size"),
        ("engine.precision=fp32", "engine.precision"),
        ("optim.lr=1e-3", "optim.lr"),
        ("seed=1", "seed"),
    ],
)
def test_folder_of_another_run_is_refused(tmp_path: Path, change: str, key: str) -> None:
    claim(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"contains a run with another '{key}'"):
        claim(tmp_path, change)
    assert (tmp_path / "config.yaml").read_text() == before


def test_environment_is_recorded(tmp_path: Path) -> None:
    claim(tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"machine", "versions", "commit", "modified_files"} <= environment.keys()
    assert {"torch", "deepspeed", "python"} <= environment["versions"].keys()
