"""Fuzzing of JSON with a declared shape."""

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.errors import UserError

SHAPE = TypeAdapter(dict[str, list[int]])
CORPUS = [
    b'{"a": [1, 2], "b": []}',
    b'{"\\ud83d": [1]}',
    b'{"a": [1e400, NaN, true]}',
    b"[" * 5000,
    b"9" * 9000,
]


@pytest.mark.parametrize("seconds", SECONDS)
def test_json_has_the_shape_or_is_refused(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "value.json"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        value = read_json(path, "value", SHAPE)
        assert all(type(item) is int for items in value.values() for item in items)

    assert fuzz(target, CORPUS, seconds, tmp_path / "failure") > len(CORPUS)


def test_allocations_hangs_and_other_errors_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.harness.MAX_SECONDS", 1)

    def allocate(data: bytes) -> object:
        return bytearray(len(data) << 31)

    def hang(data: bytes) -> None:
        while data:
            pass

    def access(data: bytes) -> object:
        return data[99]

    for target, error in ((allocate, MemoryError), (hang, TimeoutError), (access, IndexError)):
        with pytest.raises(error):
            fuzz(target, [b"x"], 0, tmp_path / "failure")
        assert (tmp_path / "failure").read_bytes() == b"x"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "pipe"])
def test_devices_folders_and_pipes_are_refused(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"not a regular file|Is a directory"):
        read_json(tmp_path / path, "value")
