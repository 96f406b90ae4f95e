"""Programs that tests run in the background."""

import socket
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

_SECONDS_TO_END = 10


@contextmanager
def ended_afterwards(process: "subprocess.Popen[bytes]") -> Generator[None]:
    """Terminate a program at the end of the block, and kill it if it does not end."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Return unused ports of 127.0.0.1."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
