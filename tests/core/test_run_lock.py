"""Lock of a run folder: one process at a time, taken over once its owner has ended."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from vqd_scale.core import run_lock
from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.run_lock import Owner, RunLock, check_free

HOLD = """
import sys, time
from pathlib import Path
from vqd_scale.core.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.02)


@pytest.fixture
def holder(tmp_path: Path) -> Generator["subprocess.Popen[bytes]"]:
    """Process that holds the lock of the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.wait()


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".lock*"))


def acquire(folder: Path) -> float:
    """Acquire and release the lock; return the seconds that it took."""
    start = time.monotonic()
    with closing(RunLock(folder)) as lock:
        lock.acquire()
        lock.check()
        return time.monotonic() - start


def test_second_process_is_refused_at_once_and_names_the_owner(
    tmp_path: Path, holder: "subprocess.Popen[bytes]"
) -> None:
    for refused in (acquire, check_free):
        with pytest.raises(UserError, match=rf"process {holder.pid} on .* trains here"):
            refused(tmp_path)


def test_killed_owner_is_replaced_at_once(
    tmp_path: Path, holder: "subprocess.Popen[bytes]", caplog: pytest.LogCaptureFixture
) -> None:
    holder.kill()
    # Not waited for: a zombie has ended, too.
    time.sleep(0.1)
    check_free(tmp_path)
    assert acquire(tmp_path) < 0.9
    assert f"process {holder.pid} on" in caplog.text and "takes over" in caplog.text
    assert locks(tmp_path) == [".lock-2.json"]
    caplog.clear()
    acquire(tmp_path)
    assert caplog.text == ""


def lock_elsewhere(folder: Path, **fields: str) -> Path:
    """Write the lock of a process on another host."""
    owner = Owner.of_this_process(folder).model_copy(update={"host": "far", "machine": "other", **fields})
    path = folder / ".lock-1.json"
    publish_json(path, owner.model_dump())
    return path


@pytest.mark.parametrize("clock", [1_000_000.0, 4_000_000_000.0])
def test_owner_on_another_host_is_observed_without_its_clock(tmp_path: Path, clock: float) -> None:
    path, stop = lock_elsewhere(tmp_path), threading.Event()

    def beat() -> None:
        for number in range(10_000):
            os.utime(path, (clock, clock + number))
            if stop.wait(0.1):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"process [0-9]+ on far trains here"):
            acquire(tmp_path)
    finally:
        stop.set()
        thread.join()
    assert acquire(tmp_path) >= 1.0


def test_own_job_of_an_earlier_start_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    lock_elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert acquire(tmp_path) < 0.9
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    lock_elsewhere(tmp_path, job="72")
    assert acquire(tmp_path) >= 1.0


def test_lock_of_a_copied_folder_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with closing(RunLock(tmp_path / "run")) as lock:
        lock.acquire()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        acquire(tmp_path / "copy")


@pytest.mark.parametrize("has_expired_owner", [False, True])
@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_processes_acquires_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_expired_owner: bool, has_links: bool
) -> None:
    if has_expired_owner:
        lock_elsewhere(tmp_path)
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *paths: Path("/proc/no links").stat())  # pyright: ignore[reportUnknownLambdaType]
    owners: list[RunLock] = []
    refusals: list[UserError] = []

    def start() -> None:
        lock = RunLock(tmp_path)
        try:
            lock.acquire()
            owners.append(lock)
        except UserError as refusal:
            refusals.append(refusal)

    threads = [threading.Thread(target=start) for _ in range(8 if has_links else 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (owner,) = owners
    assert len(refusals) == len(threads) - 1
    owner.check()
    owner.close()


def test_suspended_owner_stops_before_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suspended = RunLock(tmp_path)
    suspended.acquire()
    # Another host sees no update.
    monkeypatch.setattr(run_lock, "_machine", lambda: "another")
    monkeypatch.setattr(run_lock, "_mtime", lambda path: 1)  # pyright: ignore[reportUnknownLambdaType]
    with closing(RunLock(tmp_path)) as lock:
        lock.acquire()
        with pytest.raises(UserError, match="took over this run"):
            suspended.check()
        suspended.close()
        lock.check()


def test_released_and_damaged_locks_are_replaced(tmp_path: Path) -> None:
    for content in ("", "[]", "\0" * 99):
        (tmp_path / ".lock-7.json").write_text(content)
        assert acquire(tmp_path) < 0.9
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
