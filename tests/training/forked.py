"""A training tool on several ranks, without the seconds that PyTorch and DeepSpeed take to be imported.

Each rank is forked from a process that has imported them. In all else it is what `vqd_scale.launchers.local`
starts: a process of its own, that is told its rank by its environment and may be killed.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.daemons import free_ports
from vqd_scale.launchers import base
from vqd_scale.launchers.local import rank_environment

ROOT = Path(__file__).parents[2]
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 10.0

_SERVER = multiprocessing.get_context("forkserver")
TRAIN = "vqd_scale.cli.train"
TRAIN_TOKENIZER = "vqd_scale.cli.train_tokenizer"

_SERVER.set_forkserver_preload(
    # The last two are what a run imports only when it builds a text tower and DeepSpeed's optimizer.
    [__name__, TRAIN, TRAIN_TOKENIZER, "open_clip", "deepspeed.runtime.zero.muon.original_muon"]
)


class Ranks:
    """A tool that has been started.

    Args:
        tool: A module with a `main` that takes what was typed.
        arguments: What would be typed.
        ranks: How many processes.
        said: A folder for what they say.
    """

    def __init__(self, tool: str, arguments: Sequence[str], ranks: int, said: Path) -> None:
        (port,) = free_ports(1)
        said.mkdir(parents=True, exist_ok=True)
        self._said = [said / f"rank-{rank}.txt" for rank in range(ranks)]
        self.processes = [
            _SERVER.Process(target=_run, args=(tool, arguments, rank_environment(rank, ranks, port), path))
            for rank, path in enumerate(self._said)
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """The processes, by rank."""
        return [process.pid for process in self.processes if process.pid is not None]

    def poll(self) -> int | None:
        """The exit code of the first rank that failed, 0 once all are done, `None` before."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        return 0 if all(code == 0 for code in codes) else None

    def wait(self) -> int:
        """The same, once it is known; if a rank failed the others are ended, for they would wait for it."""
        while (code := self.poll()) is None:
            time.sleep(_POLL_SECONDS)
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        return code

    def said(self) -> str:
        """What all of them wrote."""
        return "".join(path.read_text() for path in self._said if path.exists())


def run(tool: str, *arguments: str, ranks: int, said: Path) -> "subprocess.CompletedProcess[str]":
    """Run a tool to its end."""
    started = Ranks(tool, arguments, ranks, said)
    code = started.wait()
    return subprocess.CompletedProcess([tool, *arguments], code, stderr=started.said())


def _run(tool: str, arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> None:
    import torch

    # Which ends with the tests, however they end.
    base._die_with_parent()  # pyright: ignore[reportPrivateUsage]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # The library that reads this from the environment has been loaded long ago.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with said.open("w", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        importlib.import_module(tool).main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
