"""Copies of checkpoints in a bucket, as `checkpoint.mirror` makes them."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.s3.proxy import Fault, FaultProxy
from tests.training.ranks import on_ranks, own_seed, partition_of
from vqd_scale.core.atomic_io import file_sizes
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import RetryPolicy
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.manager import CheckpointConfig, Checkpoints
from vqd_scale.training.ema import EMA, EMAConfig

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
    """Images of what came back, weights and state looked at."""

    def run(world: World) -> int:
        checkpoints = checkpoints_of(folder, world, mirror)
        restored = checkpoints.resume()
        assert restored is not None
        assert restored.state["history"].tolist() == [float(restored.images)]
        assert all((flat == restored.images).all() for flat in checkpoints.partition.masters)
        return restored.images

    return on_ranks(RANKS, run)[0]


def test_a_run_whose_folder_is_lost_goes_on_from_the_bucket(folder: S3Path, tmp_path: Path) -> None:
    here = tmp_path / "checkpoints"
    save(here, folder, 8, 16)
    local = {path.name: path.stat().st_size for path in (here / "000000000016").iterdir()}
    assert file_sizes(folder / "000000000016") == local
    shutil.rmtree(here)
    assert resume(here, folder) == 16
    assert {path.name: path.stat().st_size for path in (here / "000000000016").iterdir()} == local
    # A copy is whole once its manifest lies beside it: without that the one before is taken.
    shutil.rmtree(here)
    (folder / "000000000016.json").unlink()
    assert resume(here, folder) == 8


def test_a_bucket_that_fails_is_a_warning_and_the_run_goes_on(
    folder: S3Path,
    proxy: FaultProxy,
    impatient: RetryPolicy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy.follow(lambda method, path, turn: Fault("503"))
    save(tmp_path, proxy.to(folder), 8, 16)
    assert "the checkpoint at 8 images was not copied" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000008", "000000000016"]
    assert file_sizes(folder) == {}
