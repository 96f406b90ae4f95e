"""Fuzzing of a reader for a bounded time: mutated files must be read, or refused as a user's error.

A target takes the bytes of a file. It may raise `UserError` or `BadSample`. Any other exception, an
allocation over the bound and a target that does not return are failures; the input that caused one is saved.
"""

import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import pytest

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import BadSample

SECONDS = [1.0, pytest.param(60.0, marks=pytest.mark.long)]
"""Durations to parametrize a test with: short in `make test`, long in `make test-all`."""

MAX_BYTES = 1 << 30
"""Memory in bytes that a target may allocate for one small input."""
MAX_SECONDS = 30
"""Time in seconds after which a target counts as never returning."""

_INTERESTING = (b"\0", b"\xff", b"\x7f", b"-1", b"1e999", b"99999999999999999999", b"[" * 300, b"null")


def mutated(content: bytes, random_numbers: random.Random) -> bytes:
    """Return a copy of a file with one to eight random changes: flips, cuts, copies, insertions, zeros."""
    data = bytearray(content)
    for _ in range(random_numbers.choice((1, 1, 1, 2, 4, 8))):
        start = random_numbers.randrange(len(data) + 1)
        length = min(len(data) - start, random_numbers.choice((1, 2, 4, 8, 16, 512)))
        match random_numbers.randrange(7):
            case 0 if start < len(data):
                data[start] ^= 1 << random_numbers.randrange(8)
            case 1:
                data[start : start + length] = bytes(length)
            case 2:
                data[start : start + length] = random_numbers.randbytes(length)
            case 3:
                del data[start : start + length]
            case 4:
                data[start:start] = data[start : start + length]
            case 5:
                data[start:start] = random_numbers.choice(_INTERESTING)
            case _ if random_numbers.random() < 0.1:
                del data[start:]
            case _:
                pass
    return bytes(data)


def fuzz(
    target: Callable[[bytes], object], corpus: Sequence[bytes], seconds: float, failure: Path, seed: int = 0
) -> int:
    """Run a target on mutated files of a corpus for a bounded time, beginning with the corpus itself.

    Args:
        target: Reads the bytes of a file.
        corpus: Valid or nearly valid files.
        seconds: Duration.
        failure: File to which the input that caused a failure is written.
        seed: Seed of the mutations.

    Returns:
        Number of inputs.
    """
    random_numbers = random.Random(seed)
    start, count = time.monotonic(), 0
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, _never_returns)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MAX_BYTES, limits[1]))
    try:
        while count < len(corpus) or time.monotonic() - start < seconds:
            exact = count < len(corpus)
            data = corpus[count] if exact else mutated(random_numbers.choice(corpus), random_numbers)
            count += 1
            signal.alarm(MAX_SECONDS)
            try:
                target(data)
            except (UserError, BadSample):
                pass
            except BaseException:
                failure.write_bytes(data)
                raise
            finally:
                signal.alarm(0)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGALRM, handler)
    return count


def _never_returns(signal_number: int, frame: FrameType | None) -> None:
    del signal_number, frame
    raise TimeoutError(f"the target did not return within {MAX_SECONDS} s")


def data_bytes() -> int:
    """Return the memory in bytes that counts towards RLIMIT_DATA now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmData in /proc/self/status")
