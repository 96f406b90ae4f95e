"""A run's folder holds one run, which may be gone on with in other ways but not as another run."""

import json
from pathlib import Path

import pytest

from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.training.loop import _lock_run_folder  # pyright: ignore[reportPrivateUsage]
from vqd_scale.training.tasks.denoising import TrainConfig

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
def test_a_run_may_be_gone_on_with_otherwise(tmp_path: Path, change: str) -> None:
    claim(tmp_path)
    claim(tmp_path, change)
    claim(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("denoiser.width=512", "denoiser.width"),
        ("diffusion.steps=50", "diffusion.steps"),
        ("diffusion.kind=released", "diffusion.keep_first"),
        ("tokenizer=u", "tokenizer"),
        ("data.global_batch_size=64", "data.global_batch_size"),
        ("engine.precision=fp32", "engine.precision"),
        ("optim.lr=1e-3", "optim.lr"),
        ("seed=1", "seed"),
    ],
)
def test_another_run_is_refused_in_one_sentence(tmp_path: Path, change: str, key: str) -> None:
    claim(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"holds a run with another '{key}'"):
        claim(tmp_path, change)
    assert (tmp_path / "config.yaml").read_text() == before


def test_the_folder_says_where_it_was_made(tmp_path: Path) -> None:
    claim(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert {"machine", "versions", "commit", "modified_files"} <= found.keys()
    assert {"torch", "deepspeed", "python"} <= found["versions"].keys()
