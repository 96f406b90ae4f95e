"""Uploads to a slow mirror: training does not wait, and what is cut off is sent by the next start."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.checkpoint.test_manager import checkpoints_of, move, saved
from tests.training.rank_threads import on_ranks
from vqd_scale.core.watchdog import Watchdog, beat, watched
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint import mirror as mirror_module
from vqd_scale.training.checkpoint.manifest import StoredFile
from vqd_scale.training.config import CheckpointConfig


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Function that makes every copy to a mirror wait for a function."""
    copy = mirror_module.copy_verified

    def slow_down(wait: Callable[[], object]) -> None:
        def copy_late(source: Path, target: Path, file: StoredFile) -> None:
            wait()
            copy(source, target, file)

        monkeypatch.setattr(mirror_module, "copy_verified", copy_late)

    return slow_down


def test_cut_off_upload_is_sent_by_the_next_start(
    tmp_path: Path, slow_copy: Callable[[Callable[[], object]], None], caplog: pytest.LogCaptureFixture
) -> None:
    arrives = threading.Event()
    cut_off_threads: set[threading.Thread] = set()

    def copy_block() -> None:
        """Wait, and fail in the thread that stands for the process that ended."""
        if not arrives.is_set():
            cut_off_threads.add(threading.current_thread())
        arrives.wait()
        if threading.current_thread() in cut_off_threads:
            raise OSError("the process ended")

    slow_copy(copy_block)
    folder, mirror = tmp_path / "here", tmp_path / "there"
    config = CheckpointConfig(mirror=mirror, keep_last=1)

    def stop_early(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, config)
        for value in (8, 16, 24):
            move(checkpoints, value)
            checkpoints.save(value, {"history": checkpoints.partition.masters[0].detach()[:1].clone()})
            time.sleep(0.2)
        checkpoints.wait()
        with caplog.at_level(logging.WARNING):
            checkpoints.close(lambda: True)

    on_ranks(1, stop_early)
    # The one that is being copied is kept.
    assert sorted(int(path.name) for path in folder.iterdir()) == [8, 24]
    assert "the next start continues" in caplog.text
    assert not list(mirror.glob("*.json"))
    arrives.set()

    def resume(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, config)
        assert checkpoints.resume() is not None
        checkpoints.close()

    on_ranks(1, resume)
    assert (mirror / "000000000024.json").is_file()


@pytest.mark.parametrize("error", [OSError("lost"), RuntimeError("a bug")])
def test_failed_copy_is_a_warning_and_a_bug_ends_the_run(
    error: Exception,
    tmp_path: Path,
    slow_copy: Callable[[Callable[[], object]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = [error]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    slow_copy(fail_once)
    folder, mirror = tmp_path / "here", tmp_path / "there"

    def save_twice(world: World) -> None:
        checkpoints = checkpoints_of(folder, world, CheckpointConfig(mirror=mirror))
        for value in (8, 16):
            move(checkpoints, value)
            checkpoints.save(value, {"history": checkpoints.partition.masters[0].detach()[:1].clone()})
        checkpoints.wait()
        checkpoints.close()

    if isinstance(error, OSError):
        with caplog.at_level(logging.WARNING):
            on_ranks(1, save_twice)
        assert [path.name for path in mirror.glob("*.json")] == ["000000000016.json"]
        assert "was not copied to the mirror: lost" in caplog.text
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            on_ranks(1, save_twice)


def test_copies_are_progress_while_the_run_waits(
    tmp_path: Path, slow_copy: Callable[[Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []

    def fire(watchdog: Watchdog, idle: float) -> None:
        phases.append(watchdog.phase)

    def copy_blocks() -> None:
        for _ in range(5):
            time.sleep(0.3)
            beat()

    monkeypatch.setattr(Watchdog, "_exit", fire)
    slow_copy(copy_blocks)
    with watched(1.0):
        saved(tmp_path / "here", 8, config=CheckpointConfig(mirror=tmp_path / "there"), ranks=1)
        assert phases == []
        slow_copy(lambda: time.sleep(2))
        saved(tmp_path / "here", 16, config=CheckpointConfig(mirror=tmp_path / "there"), ranks=1)
    assert set(phases) == {"upload to the mirror"}
