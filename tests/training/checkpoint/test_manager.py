"""Checkpoints and what can happen to them, with ranks that are threads."""

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

from tests.training.ranks import on_ranks, own_seed, partition_of
from vqd_scale.core.atomic_io import PARTIAL
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.manager import CheckpointConfig, Checkpoints, consolidated, prune
from vqd_scale.training.checkpoint.shards import HostSlices
from vqd_scale.training.ema import EMA, EMAConfig

RANKS = 2


def network() -> nn.Module:
    with own_seed(0):
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def checkpoints_of(folder: Path, world: World, config: CheckpointConfig | None = None) -> Checkpoints:
    partition = partition_of(network(), world)
    return Checkpoints(folder, config or CheckpointConfig(), partition, EMA(EMAConfig(), partition), world)


def move(checkpoints: Checkpoints, value: float) -> None:
    """Give all that is saved a value of this step."""
    for number, flats in enumerate(
        (checkpoints.partition.masters, checkpoints.partition.moments("exp_avg"), checkpoints.ema.flats)
    ):
        for flat in flats:
            flat.detach().fill_(value + 100 * number)
    checkpoints.partition.steps = int(value)


def saved(folder: Path, *images: int, config: CheckpointConfig | None = None, ranks: int = RANKS) -> None:
    """A run's checkpoints, one after the other."""

    def run(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, config)
        for value in images:
            move(checkpoints, value)
            checkpoints.save(value, {"history": torch.tensor([float(value)])})
            # What comes after a save must not get into it.
            move(checkpoints, -1.0)
        checkpoints.wait()
        checkpoints.close()

    on_ranks(ranks, run)


def resumed(folder: Path, ranks: int = RANKS) -> int:
    """Images of the checkpoint that was resumed, all of its tensors checked."""

    def run(world: World) -> int:
        checkpoints = checkpoints_of(folder, world)
        restored = checkpoints.resume()
        assert restored is not None
        assert restored.state["history"].tolist() == [float(restored.images)]
        assert checkpoints.partition.steps == restored.images
        for number, flats in enumerate(
            (checkpoints.partition.masters, checkpoints.partition.moments("exp_avg"), checkpoints.ema.flats)
        ):
            assert all((flat == restored.images + 100 * number).all() for flat in flats)
        return restored.images

    return on_ranks(ranks, run)[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_on_two_ranks_comes_back_on_any(tmp_path: Path, ranks: int, asynchronous: bool) -> None:
    saved(tmp_path, 8, 16, config=CheckpointConfig(asynchronous=asynchronous))
    assert resumed(tmp_path, ranks) == 16
    assert not list(tmp_path.glob(f"*{PARTIAL}"))


def test_the_slices_are_what_safetensors_reads(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    slices = [load_file(path) for path in sorted((tmp_path / "000000000008").glob("slices-*"))]
    assert len(slices) == RANKS
    total = sum(parameter.numel() for parameter in network().parameters())
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        stored = [part for file in slices for key, part in file.items() if key.startswith(f"{kind}/")]
        assert sum(len(part) for part in stored) == total
    whole = consolidated(tmp_path / "000000000008", "ema")
    assert {name: tensor.shape for name, tensor in whole.items()} == {
        name: parameter.shape for name, parameter in network().named_parameters()
    }
    assert all((tensor == 208).all() for tensor in whole.values())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_digit(path: Path) -> None:
    """The smallest damage that still is JSON, or a number."""
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
def test_any_damage_is_found_and_the_one_before_resumes(
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
    assert "trying the one before" in sentence


def test_nothing_whole_is_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    truncate(tmp_path / "000000000008" / FILES[0])
    with pytest.raises(UserError, match="no checkpoint in it is whole"):
        resumed(tmp_path)


def test_another_model_is_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path, 8)

    def run(world: World) -> None:
        partition = partition_of(nn.Linear(3, 4), world)
        Checkpoints(tmp_path, CheckpointConfig(), partition, EMA(EMAConfig(), partition), world).resume()

    with pytest.raises(UserError, match=r"of another model \(first difference: 0.bias is \[5\] there"):
        on_ranks(RANKS, run)


class Disk:
    """A disk that can be full: then nothing more can be written into an unfinished checkpoint."""

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
    """One good save, then so many that fail; a good one in between if asked."""
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


def test_a_full_disk_leaves_training_going_with_a_loud_warning(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        failing(tmp_path, disk, failures=2, tolerated=2)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    for left, warning in zip((2, 1), warnings, strict=True):
        assert warning.startswith("NO CHECKPOINT WAS WRITTEN: ")
        assert "cannot be written" in warning
        assert "newest whole checkpoint is still '000000000008'" in warning
        assert f"after {left} more failures" in warning
    assert resumed(tmp_path) == 8


def test_after_so_many_failures_in_a_row_the_run_stops(tmp_path: Path, disk: Disk) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        failing(tmp_path, disk, failures=3, tolerated=2)
    assert resumed(tmp_path) == 8


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_must_not_fail_is_seen_to_its_end(tmp_path: Path, disk: Disk, asynchronous: bool) -> None:
    """The first one and the last one of a run."""

    def run(world: World) -> None:
        checkpoints = checkpoints_of(tmp_path, world, CheckpointConfig(asynchronous=asynchronous))
        checkpoints.save(8, {"history": torch.zeros(1)}, must=True)

    disk.is_full = True
    with pytest.raises(UserError, match="cannot be written"):
        on_ranks(RANKS, run)
    disk.is_full = False
    on_ranks(RANKS, run)
    assert (tmp_path / "000000000008" / "manifest.json").exists()


def test_a_good_save_in_between_starts_the_count_anew(tmp_path: Path, disk: Disk) -> None:
    failing(tmp_path, disk, failures=3, tolerated=2, then=1)
    assert resumed(tmp_path) == 12


def test_one_rank_that_cannot_write_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_pruning_keeps_the_newest_and_those_at_multiples(tmp_path: Path) -> None:
    saved(
        tmp_path,
        *range(10, 101, 10),
        config=CheckpointConfig(every_images=10, keep_last=2, keep_every_images=35),
    )
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [40, 70, 90, 100]


def test_pruning_never_removes_the_only_good_one(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16)
    truncate(tmp_path / "000000000016" / FILES[1])
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert resumed(tmp_path) == 8


def test_a_kill_before_the_name_leaves_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16)
    killed = tmp_path / "000000000016"
    killed.rename(killed.with_name(killed.name + PARTIAL))
    assert resumed(tmp_path) == 8


def test_the_same_images_are_saved_once(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    before = (tmp_path / "000000000008" / "manifest.json").stat().st_mtime_ns
    saved(tmp_path, 8)
    assert (tmp_path / "000000000008" / "manifest.json").stat().st_mtime_ns == before


def test_state_tensors_keep_their_types(tmp_path: Path) -> None:
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
    found = on_ranks(RANKS, load)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_copy_elsewhere_brings_a_lost_run_back(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    config = CheckpointConfig(mirror=there)
    saved(here, 8, 16, config=config)
    assert sorted(path.name for path in (there / "000000000016").iterdir()) == sorted(FILES)
    shutil.rmtree(here)

    def resume(world: World) -> int:
        restored = checkpoints_of(here, world, config).resume()
        assert restored is not None
        return restored.images

    assert on_ranks(RANKS, resume) == [16, 16]
    assert resumed(here) == 16
    # A copy that did not arrive whole is none.
    shutil.rmtree(here)
    (there / "000000000016.json").unlink()
    assert on_ranks(RANKS, resume) == [8, 8]


def test_a_copy_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    saved(tmp_path / "here", 8, config=CheckpointConfig(mirror=tmp_path / "file"))
    assert "the checkpoint at 8 images was not copied" in caplog.text
    assert resumed(tmp_path / "here") == 8


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_what_writes_gives_way_to_what_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
