"""Ordered parallel map over processes."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """Yield the function's results in the order of the items.

    Args:
        function: Function of one item. With several workers, function, items and results must be picklable.
        items: Arguments, one per call.
        workers: Number of processes; 1 runs in the calling process.

    Raises:
        Exception: First exception that the function raised; items not yet started are canceled.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # spawn: neither S3 clients nor torch's threads survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker) as pool:
        results = [pool.submit(function, item) for item in items]
        try:
            for result in results:
                yield result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _init_worker() -> None:
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread per process, for the libraries that the process imports after this line, torch among them.
    os.environ["OMP_NUM_THREADS"] = "1"
