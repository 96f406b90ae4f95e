"""Checkpoints and their failures, with ranks as threads."""

import errno
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training.rank_threads import on_ranks, own_seed, partition_of
from vqd_scale.core.atomic_io import PARTIAL
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.manager import Checkpoints, consolidated
from vqd_scale.training.checkpoint.retention import prune
from vqd_scale.training.checkpoint.shards import HostSlices
from vqd_scale.training.config import CheckpointConfig, EMAConfig
from vqd_scale.training.ema import EMA

RANKS = 2


def network() -> nn.Module:
    with own_seed(0):
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def checkpoints_of(folder: Path, world: World, config: CheckpointConfig | None = None) -> Checkpoints:
    partition = partition_of(network(), world)
    return Checkpoints(folder, config or CheckpointConfig(), partition, EMA(EMAConfig(), partition), world)


def move(checkpoints: Checkpoints, value: float) -> None:
    """Set all saved values to those of this step."""
    for number, flats in enumerate(
        (checkpoints.partition.masters, checkpoints.partition.tensors()["exp_avg"], checkpoints.ema.flats)
    ):
        for flat in flats:
            flat.detach().fill_(value + 100 * number)
    checkpoints.partition.steps = int(value)


def saved(folder: Path, *images: int, config: CheckpointConfig | None = None, ranks: int = RANKS) -> None:
    """Save a run's checkpoints in turn."""

    def run(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, config)
        for value in images:
            move(checkpoints, value)
            checkpoints.save(value, {"history": torch.tensor([float(value)])})
            # Later changes must not affect a save in progress.
            move(checkpoints, -1.0)
        checkpoints.wait()
        checkpoints.close()

    on_ranks(ranks, run)


def resumed(folder: Path, ranks: int = RANKS) -> int:
    """Resume, check all tensors, and return the checkpoint's images."""

    def run(world: World) -> int:
        checkpoints = checkpoints_of(folder, world)
        restored = checkpoints.resume()
        assert restored is not None
        assert restored.state["history"].tolist() == [float(restored.images)]
        assert checkpoints.partition.steps == restored.images
        for number, flats in enumerate(
            (checkpoints.partition.masters, checkpoints.partition.tensors()["exp_avg"], checkpoints.ema.flats)
        ):
            assert all((flat == restored.images + 100 * number).all() for flat in flats)
        return restored.images

    return on_ranks(ranks, run)[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_checkpoint_of_two_ranks_loads_on_any_number(tmp_path: Path, ranks: int, asynchronous: bool) -> None:
    saved(tmp_path, 8, 16, config=CheckpointConfig(asynchronous=asynchronous))
    assert resumed(tmp_path, ranks) == 16
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


def test_slices_are_readable_by_safetensors(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    slices = [load_file(path) for path in sorted((tmp_path / "000000000008").glob("slices-*"))]
    assert len(slices) == RANKS
    total = sum(parameter.numel() for parameter in network().parameters())
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        stored = [part for file in slices for key, part in file.items() if key.startswith(f"{kind}/")]
        assert sum(len(part) for part in stored) == total
    ema_weights = consolidated(tmp_path / "000000000008", "ema")
    assert {name: tensor.shape for name, tensor in ema_weights.items()} == {
        name: parameter.shape for name, parameter in network().named_parameters()
    }
    assert all((tensor == 208).all() for tensor in ema_weights.values())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_digit(path: Path) -> None:
    """Apply the smallest damage that is still JSON, or a number."""
    content = bytearray(path.read_bytes())
    place = next(place for place, byte in enumerate(content) if chr(byte).isdigit())
    content[place] ^= 1
    path.write_bytes(content)


FILES = [
    "slices-00000-of-00002.safetensors",
    "slices-00001-of-00002.safetensors",
    "state.safetensors",
    "manifest.json",
]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_a_digit, Path.unlink])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_is_detected_and_previous_checkpoint_resumes(
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], None],
    ranks: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(tmp_path, 8, 16)
    assert sorted(path.name for path in (tmp_path / "000000000016").iterdir()) == sorted(FILES)
    damage(tmp_path / "000000000016" / file)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path, ranks) == 8
    (sentence,) = [record.getMessage() for record in caplog.records]
    assert "000000000016: not used, " in sentence
    assert "trying the previous checkpoint" in sentence


def test_no_valid_checkpoint_raises_user_error(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    truncate(tmp_path / "000000000008" / FILES[0])
    with pytest.raises(UserError, match="contains no valid checkpoint"):
        resumed(tmp_path)


def test_checkpoint_of_another_model_raises_user_error(tmp_path: Path) -> None:
    saved(tmp_path, 8)

    def run(world: World) -> None:
        partition = partition_of(nn.Linear(3, 4), world)
        Checkpoints(tmp_path, CheckpointConfig(), partition, EMA(EMAConfig(), partition), world).resume()

    with pytest.raises(
        UserError,
        match=r"of another model \(first difference: the shape of 0.bias is \[5\] in the checkpoint",
    ):
        on_ranks(RANKS, run)


class Disk:
    """Simulated disk; if full, writes into an unfinished checkpoint fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        opened = Path.open

        def limited(path: Path, *arguments: str, **named: str) -> object:
            if self.is_full and path.parent.name.endswith(PARTIAL):
                raise OSError(errno.ENOSPC, "No space left on device")
            return opened(path, *arguments, **named)  # pyright: ignore[reportCallIssue, reportArgumentType]

        monkeypatch.setattr(Path, "open", limited)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def failing(folder: Path, disk: Disk, failures: int, tolerated: int, then: int | None = None) -> None:
    """Save once, then fail ``failures`` times; save once more at ``then`` if given."""
    config = CheckpointConfig(max_consecutive_failures=tolerated, asynchronous=False, keep_last=100)

    def run(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, config)
        move(checkpoints, 8)
        checkpoints.save(8, {"history": torch.tensor([8.0])})
        for number in range(failures):
            world.barrier()
            disk.is_full = True
            world.barrier()
            try:
                checkpoints.save(16 + 8 * number, {"history": torch.zeros(1)})
            finally:
                world.barrier()
                disk.is_full = False
            if then == number:
                world.barrier()
                move(checkpoints, 12)
                checkpoints.save(12, {"history": torch.tensor([12.0])})
        checkpoints.close()

    on_ranks(RANKS, run)


def test_full_disk_warns_and_training_continues(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        failing(tmp_path, disk, failures=2, tolerated=2)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    for remaining_failures, warning in zip((2, 1), warnings, strict=True):
        assert warning.startswith("NO CHECKPOINT WAS WRITTEN: ")
        assert "cannot be written" in warning
        assert "newest checkpoint is still '000000000008'" in warning
        assert f"after {remaining_failures} more failures" in warning
    assert resumed(tmp_path) == 8


def test_max_consecutive_failures_stop_the_run(tmp_path: Path, disk: Disk) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        failing(tmp_path, disk, failures=3, tolerated=2)
    assert resumed(tmp_path) == 8


@pytest.mark.parametrize("asynchronous", [True, False])
def test_mandatory_save_raises_on_failure(tmp_path: Path, disk: Disk, asynchronous: bool) -> None:
    """The first and the last save of a run are mandatory."""

    def run(world: World) -> None:
        checkpoints = checkpoints_of(tmp_path, world, CheckpointConfig(asynchronous=asynchronous))
        checkpoints.save(8, {"history": torch.zeros(1)}, must=True)

    disk.is_full = True
    with pytest.raises(UserError, match="cannot be written"):
        on_ranks(RANKS, run)
    disk.is_full = False
    on_ranks(RANKS, run)
    assert (tmp_path / "000000000008" / "manifest.json").exists()


def test_successful_save_resets_the_failure_count(tmp_path: Path, disk: Disk) -> None:
    failing(tmp_path, disk, failures=3, tolerated=2, then=1)
    assert resumed(tmp_path) == 12


def test_write_failure_of_one_rank_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def read_only(path: Path, *arguments: str, **named: str) -> object:
        if "slices-00001" in path.name:
            raise OSError(30, "Read-only file system")
        return opened(path, *arguments, **named)  # pyright: ignore[reportCallIssue, reportArgumentType]

    saved(tmp_path, 8)
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match=r"read-only|another rank"):
        saved(tmp_path, 16)
    monkeypatch.undo()
    assert resumed(tmp_path) == 8
    saved(tmp_path, 24)
    assert not list(tmp_path.glob(f"*{PARTIAL}"))
    assert resumed(tmp_path) == 24


@pytest.mark.parametrize("file", [*FILES, "slices-00001-of-00002.json"])
def test_failed_save_leaves_nothing_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Remains of one failed save would let every later save fail, too."""
    opened, texts = Path.open, Path.write_text

    def full(write: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *arguments: str, **named: str) -> object:
            if file.split(".")[0] in path.name and path.parent.name.endswith(PARTIAL) and path.suffix:
                is_json = ".json" in path.name
                if is_json == file.endswith(".json"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, *arguments, **named)

        return call

    config = CheckpointConfig(asynchronous=False)
    saved(tmp_path, 8, config=config)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full(opened))
        patch.setattr(Path, "write_text", full(texts))
        saved(tmp_path, 16, config=config)
        assert [path.name for path in tmp_path.iterdir()] == ["000000000008"]
    saved(tmp_path, 24, config=config)
    assert resumed(tmp_path) == 24


def test_pruning_keeps_the_newest_and_periodic_checkpoints(tmp_path: Path) -> None:
    saved(
        tmp_path,
        *range(10, 101, 10),
        config=CheckpointConfig(every_images=10, keep_last=2, keep_every_images=35),
    )
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [40, 70, 90, 100]


def test_pruning_keeps_the_only_valid_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16)
    truncate(tmp_path / "000000000016" / FILES[1])
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert resumed(tmp_path) == 8


def test_kill_before_rename_leaves_previous_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16)
    killed = tmp_path / "000000000016"
    killed.rename(killed.with_name(killed.name + PARTIAL))
    assert resumed(tmp_path) == 8


def test_equal_image_count_is_saved_once(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    before = (tmp_path / "000000000008" / "manifest.json").stat().st_mtime_ns
    saved(tmp_path, 8)
    assert (tmp_path / "000000000008" / "manifest.json").stat().st_mtime_ns == before


def test_state_tensors_keep_their_dtypes(tmp_path: Path) -> None:
    state = {"count": torch.arange(3), "history": torch.rand(4, dtype=torch.float64)}

    def save(world: World) -> None:
        checkpoints = checkpoints_of(tmp_path, world)
        checkpoints.save(8, state)
        checkpoints.wait()

    def load(world: World) -> dict[str, Tensor]:
        restored = checkpoints_of(tmp_path, world).resume()
        assert restored is not None
        return restored.state

    on_ranks(RANKS, save)
    loaded_state = on_ranks(RANKS, load)[1]
    assert all(torch.equal(loaded_state[name], tensor) for name, tensor in state.items())


def test_mirror_restores_a_lost_run(tmp_path: Path) -> None:
    run_folder, mirror_folder = tmp_path / "here", tmp_path / "there"
    config = CheckpointConfig(mirror=mirror_folder)
    saved(run_folder, 8, 16, config=config)
    assert sorted(path.name for path in (mirror_folder / "000000000016").iterdir()) == sorted(FILES)
    shutil.rmtree(run_folder)

    def resume(world: World) -> int:
        restored = checkpoints_of(run_folder, world, config).resume()
        assert restored is not None
        return restored.images

    assert on_ranks(RANKS, resume) == [16, 16]
    assert resumed(run_folder) == 16
    # An incomplete copy is not used.
    shutil.rmtree(run_folder)
    (mirror_folder / "000000000016.json").unlink()
    assert on_ranks(RANKS, resume) == [8, 8]


def test_failing_mirror_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    saved(tmp_path / "here", 8, config=CheckpointConfig(mirror=tmp_path / "file"))
    assert "the checkpoint at 8 images was not copied" in caplog.text
    assert resumed(tmp_path / "here") == 8


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_writer_thread_has_lower_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[int] = []
    write = HostSlices.write

    def watched(host: HostSlices, path: Path) -> dict[str, object]:
        writers.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write(host, path)

    monkeypatch.setattr(HostSlices, "write", watched)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    saved(tmp_path, 8)
    assert writers == [19] * RANKS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
