"""Workers that tokenize and are killed, forked from a process that has imported their modules.

    python -m tests.preparation.kill_points CONFIG points FOLDER POINTS
    python -m tests.preparation.kill_points CONFIG moments FOLDER KILLS

Each writes numbered datasets to the folder, every one of which must equal that of an uninterrupted run.
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
from vqd_scale.preparation.config import TokenizeConfig
from vqd_scale.preparation.tokenize_shards import tokenize_shards
from vqd_scale.text.clip import CaptionTokenizer

WORKERS = 2


def start_worker(config: TokenizeConfig, worker: int, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a worker and return its process id."""
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


def wait_for_worker(pid: int) -> int:
    """Wait for a worker and return its exit code, negative if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(config: TokenizeConfig, worker: int) -> None:
    """Run a worker on its remaining shards."""
    if wait_for_worker(start_worker(config, worker)):
        raise SystemExit(f"worker {worker} failed")


def killed_before(point: int) -> Callable[[], None]:
    """Return a worker that kills itself instead of its flush number ``point``.

    A file is flushed before it is renamed, and its folder after that: these are all moments at which what a
    kill leaves on the disk differs.
    """

    def prepare() -> None:
        flush, remaining_calls = os.fsync, iter(range(point, -1, -1))

        def flush_or_die(descriptor: int) -> None:
            if next(remaining_calls) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = flush_or_die

    return prepare


def points(config: TokenizeConfig, folder: Path, count: int) -> None:
    """Kill the last worker at another point for each dataset, and restart it."""
    one = config.model_copy(update={"output": folder / "0"})
    run(one, 1)
    for point in reversed(range(count)):
        out = config.model_copy(update={"output": folder / str(point)})
        if point:
            shutil.copytree(folder / "0", folder / str(point))
        print(wait_for_worker(start_worker(out, 0, killed_before(point))))
        run(out, 0)


def random_moments(config: TokenizeConfig, folder: Path, kills: int) -> None:
    """Kill both workers at random moments until a dataset is complete; repeat until ``kills`` in total."""
    generator = random.Random(0)
    began = time.monotonic()
    run(config.model_copy(update={"output": folder / "alone"}), 0)
    longest = time.monotonic() - began
    kill_count, number, out = 0, 0, config
    while kill_count < kills:
        out = config.model_copy(update={"output": folder / str(number)})
        for pid in [start_worker(out, worker) for worker in range(WORKERS)]:
            time.sleep(generator.random() * longest / WORKERS)
            os.kill(pid, signal.SIGKILL)
            kill_count += wait_for_worker(pid) == -signal.SIGKILL
        index = out.output / "index.json"
        if index.exists() and json.loads(index.read_text(encoding="utf-8"))["complete"]:
            number += 1
    for worker in range(WORKERS):
        run(out, worker)


if __name__ == "__main__":
    torch.set_num_threads(1)
    CaptionTokenizer()(["imported once, for all of them"])
    kill_mode = {"points": points, "moments": random_moments}[sys.argv[2]]
    kill_mode(load_config(TokenizeConfig, Path(sys.argv[1]), []), Path(sys.argv[3]), int(sys.argv[4]))
