"""Writing a rank's slices to the disk."""

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vqd_scale.training.checkpoint.shards import write_file

PAGE = 4096


def memory_at(begin: int, size: int) -> memoryview:
    """Return ``size`` random bytes that start ``begin`` bytes after the beginning of a page."""
    room = torch.randint(256, (size + 2 * PAGE,), generator=torch.Generator().manual_seed(size))
    room = room.to(torch.uint8)
    first = -room.data_ptr() % PAGE + begin
    return room[first : first + size].numpy().data


@given(size=st.integers(0, 5 * PAGE), begin=st.integers(0, PAGE - 1), claim=st.booleans())
@example(size=3 * PAGE, begin=0, claim=True)
@example(size=3 * PAGE + 1, begin=0, claim=True)
# Memory that is not page aligned: the system refuses direct I/O, and the write falls back.
@example(size=3 * PAGE + 1, begin=1, claim=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_bytes_equal_memory_at_any_alignment(
    tmp_path: Path, size: int, begin: int, claim: bool
) -> None:
    content = memory_at(begin, size)
    described = write_file(tmp_path / "file", content, page_aligned=claim)
    assert (tmp_path / "file").read_bytes() == content
    assert described == {"name": "file", "bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.skipif(sys.platform != "linux", reason="no other system says what is in its cache")
def test_page_aligned_write_bypasses_page_cache(tmp_path: Path) -> None:
    content = memory_at(0, 64 * PAGE)
    write_file(tmp_path / "beside", content)
    write_file(tmp_path / "past", content, page_aligned=True)

    def is_cached(name: str) -> bool:
        descriptor = os.open(tmp_path / name, os.O_RDONLY)
        try:
            return os.preadv(descriptor, [bytearray(PAGE)], 0, os.RWF_NOWAIT) == PAGE
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    try:
        os.close(os.open(tmp_path / "beside", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has nothing but its cache")
    assert is_cached("beside")
    assert not is_cached("past")
