import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqd_scale.launchers.local import rank_environment, run_locally

TOOL = """
import os, pathlib, signal, sys, time
folder, failing = pathlib.Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath(f"asked-{rank}").touch(), sys.exit(75)))
folder.joinpath(f"pid-{rank}").write_text(str(os.getpid()))
folder.joinpath(f"world-{rank}").write_text(os.environ["WORLD_SIZE"] + " " + os.environ["MASTER_PORT"])
while failing != "none" and not folder.joinpath("pid-1").exists():
    time.sleep(0.01)
if rank == failing:
    sys.exit(7)
if failing != "none":
    time.sleep(60)
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    path = tmp_path / "tool.py"
    path.write_text(TOOL)
    return path


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, pids))


def test_every_rank_gets_its_number_and_one_rendezvous(tool: Path, tmp_path: Path) -> None:
    assert run_locally(tool, [str(tmp_path), "none"], ranks=2) == 0
    first, second = ((tmp_path / f"world-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("2 ")


def test_failing_rank_ends_the_others(tool: Path, tmp_path: Path) -> None:
    assert run_locally(tool, [str(tmp_path), "1"], ranks=2) == 7
    wait_until_gone([int((tmp_path / "pid-0").read_text())])
    assert (tmp_path / "asked-0").exists()


def launcher(tool: Path, folder: Path) -> "subprocess.Popen[bytes]":
    call = f"run_locally(Path({str(tool)!r}), [{str(folder)!r}, 'no-rank'], 2)"
    code = f"import sys; from pathlib import Path; from vqd_scale.launchers.local import *; sys.exit({call})"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not all((folder / f"pid-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.02)
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_launcher(tool: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = launcher(tool, tmp_path)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    os.kill(process.pid, number)
    code = process.wait(timeout=20)
    wait_until_gone(pids)
    # A stop signal, or Ctrl-C, is forwarded to the ranks, and their exit code is returned.
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 75)
    assert (tmp_path / "asked-0").exists() == (number is not signal.SIGKILL)


def test_cores_are_divided_among_ranks() -> None:
    environment = rank_environment(1, 2, 1234)
    assert environment["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
    assert (environment["RANK"], environment["MASTER_PORT"]) == ("1", "1234")
