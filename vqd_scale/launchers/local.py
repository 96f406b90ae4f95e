"""Launcher of a tool on several ranks of this machine, for a few ranks.

torchrun starts the same tools with its own rendezvous.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vqd_scale.launchers.base import forward_signals, start_process

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0


def run_locally(tool: Path, arguments: Sequence[str], ranks: int) -> int:
    """Run a tool on ``ranks`` processes that share the CPU cores, and wait for them.

    If one rank fails, the others are terminated, because they would wait for it forever. If this process dies
    for any reason, the ranks are killed.

    Returns:
        0, or the exit code of the first failed rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, str(tool), *arguments]
    processes = [
        start_process(command, rank_environment(rank, ranks, port), Path.cwd()) for rank in range(ranks)
    ]
    with forward_signals(processes):
        try:
            return _wait(processes)
        finally:
            _end(processes)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment of a rank with torchrun's variables; CPU cores are divided evenly."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
