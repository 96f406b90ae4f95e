import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vqd_scale.launchers.base import (
    copy_source,
    decisive_exit_code,
    free_port,
    rank_with_user_error,
    read_exit_codes,
    write_exit_code,
)


def test_rank_results_are_recorded_by_rank(tmp_path: Path) -> None:
    ends = tmp_path / "ends"
    assert read_exit_codes(ends) == {}
    write_exit_code(ends, 10, 1)
    write_exit_code(ends, 2, 75)
    (ends / "3").touch()
    assert read_exit_codes(ends) == {2: 75, 10: 1}


@pytest.mark.parametrize(
    ("ends", "mistaken"), [({}, None), ({0: 75, 1: 137}, None), ({0: 137, 1: 2, 2: 2}, 1), ({0: 0}, None)]
)
def test_user_error_is_reported_among_terminated_ranks(ends: dict[int, int], mistaken: int | None) -> None:
    assert rank_with_user_error(ends) == mistaken


@pytest.mark.parametrize(
    ("ends", "code", "decisive"),
    [
        ({}, 143, 143),
        ({0: 143, 1: 76}, 143, 76),
        ({0: 137, 1: 75}, 137, 75),
        ({0: 76, 1: 75}, 76, 75),
        ({0: 0, 1: 0}, 0, 0),
    ],
)
def test_terminated_rank_does_not_hide_a_save_or_a_hang(
    ends: dict[int, int], code: int, decisive: int
) -> None:
    assert decisive_exit_code(ends, code) == decisive


def test_ports_are_free_and_differ_between_numbers() -> None:
    port = free_port(4711)
    assert port == free_port(4711) != free_port(4712)
    with socket.create_server(("127.0.0.1", port)):
        assert free_port(4711) > port


def test_code_copy_is_what_its_tools_import(tmp_path: Path) -> None:
    code = copy_source(tmp_path / "code")
    (code / "vqd_scale" / "core" / "errors.py").write_text("raise SystemExit(9)\n")
    completed = subprocess.run(
        [sys.executable, str(code / "tools" / "train.py"), "--help"],
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        check=False,
    )
    assert completed.returncode == 9
