"""Functions shared by all launchers: ranks as child processes, and the exit codes of ranks."""

import ctypes
import shutil
import signal
import socket
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType

from vqd_scale.core.errors import USER_ERROR_EXIT_CODE, UserError
from vqd_scale.core.signals import HUNG_EXIT_CODE, REQUEUE_EXIT_CODE, STOP_SIGNALS

_DIE_WITH_PARENT = 1


def start_process(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> "subprocess.Popen[bytes]":
    """Start a command as a child process that the kernel kills when this process dies for any reason.

    Args:
        command: Program and arguments, run without a shell.
        environment: Complete environment of the child process.
        folder: Working directory of the child process.
    """
    return subprocess.Popen(  # noqa: S603 - the child only asks to die with its parent
        command, env=environment, cwd=folder, preexec_fn=_die_with_parent
    )


@contextmanager
def forward_signals(processes: Sequence["subprocess.Popen[bytes]"]) -> Generator[None]:
    """Forward stop signals to the ranks, which save a checkpoint and exit by themselves.

    Ctrl-C is forwarded as SIGTERM, since the terminal sends it to the ranks as well; a second one interrupts.
    """
    interrupts = count()

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and next(interrupts) > 0:
            raise KeyboardInterrupt
        for process in processes:
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    handlers = {number: signal.signal(number, forward) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write_exit_code(folder: Path, rank: int, code: int) -> None:
    """Write the exit code of a rank to a file that the launchers of the other ranks can read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(rank)).write_text(f"{code}\n", encoding="utf-8")


def read_exit_codes(folder: Path) -> dict[int, int]:
    """Return the exit codes of finished ranks, by rank; a lost rank has no entry."""
    if not folder.exists():
        return {}
    texts = {int(path.name): path.read_text(encoding="utf-8").strip() for path in folder.iterdir()}
    # A file is briefly empty while its rank writes it.
    return {rank: int(text) for rank, text in sorted(texts.items()) if text}


def free_port(number: int) -> int:
    """Return a free port of this machine below the ephemeral ports, derived from a number."""
    while True:
        port = 10_000 + number % 20_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
        number += 1


def rank_with_user_error(exit_codes: Mapping[int, int]) -> int | None:
    """Return the first rank with `USER_ERROR_EXIT_CODE`, if any; ranks that waited for it are ignored."""
    return next((rank for rank, code in exit_codes.items() if code == USER_ERROR_EXIT_CODE), None)


def decisive_exit_code(exit_codes: Mapping[int, int], code: int) -> int:
    """Return the exit code of a rank that saved or hung, else ``code``: the other ranks were ended for it."""
    codes = set(exit_codes.values())
    return next((decisive for decisive in (REQUEUE_EXIT_CODE, HUNG_EXIT_CODE) if decisive in codes), code)


def copy_source(folder: Path) -> Path:
    """Copy this package and its tools, so that a restarted job runs the submitted code.

    Returns:
        The folder of the copy.

    Raises:
        UserError: The package is installed without ``tools/`` beside it.
    """
    package = Path(__file__).parents[1]
    tools = package.parent / "tools"
    if not (tools / "train.py").is_file():
        raise UserError(f"{tools}: the tools are not there; launch from a checkout of the project.")
    without_bytecode = shutil.ignore_patterns("__pycache__")
    for source in (package, tools):
        shutil.copytree(source, folder / source.name, ignore=without_bytecode)
    return folder


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
