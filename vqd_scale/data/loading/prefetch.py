"""Prefetching generators, in a thread or in processes."""

import itertools
import multiprocessing
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch

from vqd_scale.core.errors import UserError

Item = TypeVar("Item")


def in_thread(produce: Callable[[threading.Event], Generator[Item]], depth: int) -> Generator[Item]:
    """Yield a generator's items, prefetched in a thread; its exceptions are raised in the consumer.

    Args:
        produce: Factory of the generator. Its argument is an event that is set when the consumer closes;
            blocking waits should check the event.
        depth: Number of prefetched items.
    """
    ready: queue.Queue[Item | Exception] = queue.Queue(depth)
    is_closed = threading.Event()

    def offer(item: Item | Exception) -> None:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        # Pass every exception to the consumer: a silently dead thread would block it forever.
        try:
            with closing(produce(is_closed)) as items:
                for item in items:
                    offer(item)
                    if is_closed.is_set():
                        return
        except Exception as error:  # noqa: BLE001
            offer(error)

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        is_closed.set()
        # The thread may be blocked on a full queue.
        with suppress(queue.Empty):
            while True:
                ready.get_nowait()
        thread.join()


def in_processes(
    producers: Sequence[Callable[[], Generator[Item]]], depth: int, is_closed: threading.Event
) -> Generator[Item]:
    """Yield items of several generators round-robin, each prefetched in its own process.

    Args:
        producers: Factories of the generators; factories and items must be picklable.
        depth: Number of prefetched items per generator.
        is_closed: Event that is set when the consumer closes.

    Raises:
        UserError: Raised by one of the generators.
        RuntimeError: A process died.
    """
    # spawn: neither S3 clients nor torch's threads survive a fork.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for producer in producers:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(producer, depth, sender), daemon=True)
            process.start()
            # Only the child keeps this end open, so its death is an end of file and not an endless wait.
            sender.close()
            connections.append(receiver)
            processes.append(process)
        for connection in itertools.cycle(connections):
            while not connection.poll(0.1):
                if is_closed.is_set():
                    return
            try:
                item = connection.recv()
            except EOFError:
                raise RuntimeError("a reading process died; what it printed above says why") from None
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for connection in connections:
            connection.close()


def _serve(producer: Callable[[], Generator[object]], depth: int, connection: Connection) -> None:
    """Run a reading process: prefetch in a thread and send the items."""
    # There is already one such process per spare core.
    torch.set_num_threads(1)
    try:
        for item in in_thread(lambda _: producer(), depth):
            connection.send(item)
    except UserError as error:
        connection.send(error)
