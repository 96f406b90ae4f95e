"""Copies of checkpoints in a bucket, written by `checkpoint.mirror`."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.s3.proxy import Fault, FaultProxy
from tests.training.rank_threads import on_ranks, own_seed, partition_of
from vqd_scale.core.atomic_io import file_sizes
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import RetryPolicy
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.manager import Checkpoints
from vqd_scale.training.config import CheckpointConfig, EMAConfig
from vqd_scale.training.ema import EMA

pytestmark = pytest.mark.s3
RANKS = 2


def checkpoints_of(folder: Path, world: World, mirror: S3Path) -> Checkpoints:
    with own_seed(0):
        network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    partition = partition_of(network, world)
    return Checkpoints(folder, CheckpointConfig(mirror=mirror), partition, EMA(EMAConfig(), partition), world)


def save(folder: Path, mirror: S3Path, *images: int) -> None:
    def run(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, mirror)
        for value in images:
            for flat in checkpoints.partition.masters:
                flat.detach().fill_(value)
            checkpoints.save(value, {"history": torch.tensor([float(value)])})
        checkpoints.wait()
        checkpoints.close()

    on_ranks(RANKS, run)


def resume(folder: Path, mirror: S3Path) -> int:
    """Resume and return the images seen, after checking weights and state."""

    def run(world: World) -> int:
        checkpoints = checkpoints_of(folder, world, mirror)
        restored = checkpoints.resume()
        assert restored is not None
        assert restored.state["history"].tolist() == [float(restored.images)]
        assert all((flat == restored.images).all() for flat in checkpoints.partition.masters)
        return restored.images

    return on_ranks(RANKS, run)[0]


def test_lost_run_folder_resumes_from_bucket(folder: S3Path, tmp_path: Path) -> None:
    run_checkpoints = tmp_path / "checkpoints"
    save(run_checkpoints, folder, 8, 16)
    local = {path.name: path.stat().st_size for path in (run_checkpoints / "000000000016").iterdir()}
    assert file_sizes(folder / "000000000016") == local
    shutil.rmtree(run_checkpoints)
    assert resume(run_checkpoints, folder) == 16
    assert {path.name: path.stat().st_size for path in (run_checkpoints / "000000000016").iterdir()} == local
    # A copy is complete once its manifest exists: without it the previous one is used.
    shutil.rmtree(run_checkpoints)
    (folder / "000000000016.json").unlink()
    assert resume(run_checkpoints, folder) == 8


def test_failing_bucket_warns_and_training_continues(
    folder: S3Path,
    proxy: FaultProxy,
    short_retries: RetryPolicy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy.follow(lambda method, path, turn: Fault("503"))
    save(tmp_path, proxy.to(folder), 8, 16)
    assert "the checkpoint at 8 images was not copied" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000008", "000000000016"]
    assert file_sizes(folder) == {}
