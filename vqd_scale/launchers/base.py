"""What every way of starting ranks shares: a rank as a child process, and what follows on how ranks ended."""

import ctypes
import shutil
import signal
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vqd_scale.core.errors import UserError
from vqd_scale.core.signals import STOP_SIGNALS

MISTAKE = 2
"""Exit code of a tool after a mistake that one sentence names: it would be made again."""

_DIE_WITH_PARENT = 1


def started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> "subprocess.Popen[bytes]":
    """Start a command that dies with this process, however this one dies.

    Args:
        command: A program and its arguments; no shell sees them.
        environment: All of its variables.
        folder: Where it runs.
    """
    return subprocess.Popen(  # noqa: S603 - the child only asks to die with its parent
        command, env=environment, cwd=folder, preexec_fn=_die_with_parent
    )


@contextmanager
def forwarding_signals(processes: Sequence["subprocess.Popen[bytes]"]) -> Generator[None]:
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


def note_end(ends: Path, rank: int, code: int) -> None:
    """Write down how a rank ended, where the others' launchers can read it."""
    ends.mkdir(parents=True, exist_ok=True)
    (ends / str(rank)).write_text(f"{code}\n", encoding="utf-8")


def noted_ends(ends: Path) -> dict[int, int]:
    """How the ranks that have ended did, by rank; a rank that was lost notes nothing."""
    if not ends.exists():
        return {}
    texts = {int(path.name): path.read_text(encoding="utf-8").strip() for path in ends.iterdir()}
    # A file that is being written is empty for a moment.
    return {rank: int(text) for rank, text in sorted(texts.items()) if text}


def mistaken_rank(ends: Mapping[int, int]) -> int | None:
    """The first rank that found a mistake, whatever happened to those that waited for it."""
    return next((rank for rank, code in ends.items() if code == MISTAKE), None)


def copy_of_the_code(folder: Path) -> Path:
    """A copy of this package and its tools, so that a job started again runs what was submitted.

    Raises:
        UserError: This is an installed package, without tools beside it.
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
