"""Hangs of a process and of its ranks: exit code, stacks, phases, and the progress of other ranks."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vqd_scale.core.progress import progress
from vqd_scale.core.signals import HUNG_EXIT_CODE
from vqd_scale.core.watchdog import Watchdog, beat, phase, share_progress, watched

HANG = """
import sys, time
from pathlib import Path
from vqd_scale.core.watchdog import Watchdog, beat, phase, watched

def waiting_for_a_rank_that_is_gone():
    time.sleep(60)

with watched(0.5, Path(sys.argv[1])), watched(60), phase("validation"):
    beat()
    waiting_for_a_rank_that_is_gone()
"""


@pytest.mark.parametrize("folder", [".", "absent"])
def test_hang_exits_with_phase_stacks_and_its_own_code(tmp_path: Path, folder: str) -> None:
    report = tmp_path / folder / "stacks.txt"
    completed = subprocess.run(
        [sys.executable, "-c", HANG, str(report)], capture_output=True, text=True, check=False
    )
    assert completed.returncode == HUNG_EXIT_CODE
    for text in (completed.stderr, *([report.read_text()] if report.parent.exists() else [])):
        assert "in this phase: validation" in text
        assert "waiting_for_a_rank_that_is_gone" in text


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Phases in which a watchdog of this process fires."""
    phases: list[str] = []

    def fire(watchdog: Watchdog, idle: float) -> None:
        phases.append(watchdog.phase)

    monkeypatch.setattr(Watchdog, "_exit", fire)
    return phases


def test_progress_bars_and_phases_are_progress(exits: list[str]) -> None:
    with watched(1.0):
        for _ in progress(range(4), "work", 4, quiet=True):
            time.sleep(0.4)
        for _ in range(4):
            with phase("load of a checkpoint"):
                time.sleep(0.4)
        assert exits == []
        with phase("export"):
            time.sleep(1.6)
    assert set(exits) == {"export"}


def test_threads_count_only_while_the_main_thread_awaits_them(exits: list[str]) -> None:
    stop = threading.Event()

    def upload() -> None:
        while not stop.wait(0.05):
            beat()

    thread = threading.Thread(target=upload)
    thread.start()
    with watched(1.0):
        with phase("upload", awaits_threads=True):
            time.sleep(1.6)
        assert exits == []
        with phase("training"):
            time.sleep(1.6)
    stop.set()
    thread.join()
    assert set(exits) == {"training"}


def test_progress_of_another_rank_counts_until_it_ends(exits: list[str]) -> None:
    counter = [0]

    def add(amount: int) -> int:
        counter[0] += 1 - amount if time.monotonic() < end else 0
        return counter[0]

    end = time.monotonic() + 1.6
    with watched(1.0):
        share_progress(add)
        time.sleep(1.6)
        assert exits == []
        time.sleep(1.6)
    assert exits


def test_lost_counter_of_the_ranks_leaves_each_on_its_own(exits: list[str]) -> None:
    def add(amount: int) -> int:
        raise RuntimeError("the first rank is gone")

    with watched(1.0):
        share_progress(add)
        for _ in range(16):
            beat()
            time.sleep(0.1)
        assert exits == []
