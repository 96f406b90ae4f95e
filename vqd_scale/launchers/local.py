"""A tool on several ranks of this machine, started and watched by this process.

For one machine and a handful of ranks; torchrun starts the same tools with its own rendezvous.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vqd_scale.core.stop import STOP_SIGNALS

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
_DIE_WITH_PARENT = 1


def run_on_this_machine(tool: Path, arguments: Sequence[str], ranks: int) -> int:
    """Run a tool on ``ranks`` processes that share the cores, and wait for them.

    If one fails the others are ended: they would wait for it for ever. If this process dies, however it dies,
    the ranks die with it.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, str(tool), *arguments]
    processes = [
        # Nothing of the caller's reaches a shell, and the child only asks to die with its parent.
        subprocess.Popen(  # noqa: S603
            command,
            env=rank_environment(rank, ranks, port),
            preexec_fn=_die_with_parent,
        )
        for rank in range(ranks)
    ]
    with _forwarding_signals(processes):
        try:
            return _wait(processes)
        finally:
            _end(processes)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What tells a process its rank, as torchrun does; the cores are shared out evenly."""
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


@contextmanager
def _forwarding_signals(processes: Sequence["subprocess.Popen[bytes]"]) -> Generator[None]:
    """Whoever asks this process to stop means the ranks: they save, and end in their own time."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
