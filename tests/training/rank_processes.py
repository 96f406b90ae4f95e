"""A training tool on several ranks, without the import time of PyTorch and DeepSpeed.

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

from tests.background_programs import free_ports
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
    """The processes of a started tool.

    Args:
        tool: Module with a `main` that takes command-line arguments.
        arguments: Command-line arguments.
        ranks: Number of processes.
        output_folder: Folder for one output file per rank.
    """

    def __init__(self, tool: str, arguments: Sequence[str], ranks: int, output_folder: Path) -> None:
        (port,) = free_ports(1)
        output_folder.mkdir(parents=True, exist_ok=True)
        self._output_files = [output_folder / f"rank-{rank}.txt" for rank in range(ranks)]
        self.processes = [
            _SERVER.Process(target=_run, args=(tool, arguments, rank_environment(rank, ranks, port), path))
            for rank, path in enumerate(self._output_files)
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """Return the process ids by rank."""
        return [process.pid for process in self.processes if process.pid is not None]

    def poll(self) -> int | None:
        """Return the exit code of the first failed rank, 0 once all have ended, `None` before."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        return 0 if all(code == 0 for code in codes) else None

    def wait(self) -> int:
        """Wait for the exit code; if a rank failed, end the other ranks, which would wait for it."""
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

    def output(self) -> str:
        """Return the output of all ranks, joined."""
        return "".join(path.read_text() for path in self._output_files if path.exists())


def run(tool: str, *arguments: str, ranks: int, output_folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a tool to its end."""
    started = Ranks(tool, arguments, ranks, output_folder)
    code = started.wait()
    return subprocess.CompletedProcess([tool, *arguments], code, stderr=started.output())


def _run(tool: str, arguments: Sequence[str], environment: Mapping[str, str], output_file: Path) -> None:
    import torch

    # The server process ends with the tests.
    base._die_with_parent()  # pyright: ignore[reportPrivateUsage]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # The library that reads this from the environment is already loaded.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with output_file.open("w", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        importlib.import_module(tool).main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
