"""Workers that tokenize and are killed, forked from a process that has imported what they need.

    python -m tests.preparation.killed CONFIG points FOLDER POINTS
    python -m tests.preparation.killed CONFIG moments FOLDER KILLS

Each makes numbered sets in the folder, every one of which is to be what it is without a kill.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from vqd_scale.core.config import load_config
from vqd_scale.data.shards.parallel_writer import Worker
from vqd_scale.preparation.tokenize_shards import TokenizeConfig, tokenize_shards
from vqd_scale.text.clip import CaptionTokenizer

WORKERS = 2


def started(config: TokenizeConfig, worker: int, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a worker; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        prepare()
        tokenize_shards(config, torch.device("cpu"), Worker(worker, WORKERS))
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> int:
    """Wait for a worker; its exit code, negative if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(config: TokenizeConfig, worker: int) -> None:
    """Let a worker do what is left of its shards."""
    if ended(started(config, worker)):
        raise SystemExit(f"worker {worker} failed")


def killed_before(point: int) -> Callable[[], None]:
    """A worker that kills itself instead of flushing for the so-manyth time.

    A file is flushed before it is renamed, and its folder after that: these are all moments at which what a
    kill leaves on the disk differs.
    """

    def prepare() -> None:
        flush, left = os.fsync, iter(range(point, -1, -1))

        def flush_or_die(descriptor: int) -> None:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = flush_or_die

    return prepare


def points(config: TokenizeConfig, folder: Path, count: int) -> None:
    """For each set kill the last worker at another moment, and start it again."""
    one = config.model_copy(update={"output": folder / "0"})
    run(one, 1)
    for point in reversed(range(count)):
        out = config.model_copy(update={"output": folder / str(point)})
        if point:
            shutil.copytree(folder / "0", folder / str(point))
        print(ended(started(out, 0, killed_before(point))))
        run(out, 0)


def moments(config: TokenizeConfig, folder: Path, kills: int) -> None:
    """Kill both workers at random moments until a set is whole; set after set, so many times altogether."""
    generator = random.Random(0)
    began = time.monotonic()
    run(config.model_copy(update={"output": folder / "alone"}), 0)
    longest = time.monotonic() - began
    done, number, out = 0, 0, config
    while done < kills:
        out = config.model_copy(update={"output": folder / str(number)})
        for pid in [started(out, worker) for worker in range(WORKERS)]:
            time.sleep(generator.random() * longest / WORKERS)
            os.kill(pid, signal.SIGKILL)
            done += ended(pid) == -signal.SIGKILL
        index = out.output / "index.json"
        if index.exists() and json.loads(index.read_text(encoding="utf-8"))["complete"]:
            number += 1
    for worker in range(WORKERS):
        run(out, worker)


if __name__ == "__main__":
    torch.set_num_threads(1)
    CaptionTokenizer()(["imported once, for all of them"])
    what = {"points": points, "moments": moments}[sys.argv[2]]
    what(load_config(TokenizeConfig, Path(sys.argv[1]), []), Path(sys.argv[3]), int(sys.argv[4]))
