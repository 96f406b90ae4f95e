"""Exit codes and messages of a tool, and groups of options."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from vqd_scale.cli.base import Tool, location_from
from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import FirstRankError, UserError
from vqd_scale.core.s3 import S3Path


@dataclass(frozen=True, kw_only=True)
class Size:
    """A group of options."""

    width: Annotated[int, typer.Option(min=1)] = 8
    height: Annotated[int, typer.Option(min=1)] = 4


def tool_that_raises(error: BaseException) -> Tool:
    main = Tool()

    @main.command("python tools/resize.py")
    def resize() -> None:
        """Raise the error."""
        raise error

    assert resize.__name__ == "resize"
    return main


def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variables of ranks: DeepSpeed sets some for the rest of a process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "VQD_RANK_LOG"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "rank", "code", "message"),
    [
        (UserError("give a size."), 0, 2, ": give a size.\n"),
        (UserError("give a size."), 1, 2, ""),
        (FirstRankError("give a size."), 0, 2, ""),
        (KeyboardInterrupt(), 0, 130, ": interrupted; the same command resumes.\n"),
        (SystemExit(75), 0, 75, ""),
    ],
)
def test_exit_code_and_message(
    error: BaseException,
    rank: int,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_ranks(monkeypatch)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("sys.argv", ["tools/resize.py"])
    with pytest.raises(SystemExit) as end:
        tool_that_raises(error)([])
    assert end.value.code == code
    assert capsys.readouterr().err == (f"resize.py{message}" if message else "")


@pytest.mark.parametrize(
    ("environment", "prints"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"RANK": "5", "LOCAL_RANK": "1"}, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, True),
        ({"RANK": "5", "LOCAL_RANK": "1", "VQD_RANK_LOG": "1"}, True),
    ],
    ids=["srun", "first of srun", "torchrun", "first of a torchrun", "own log"],
)
@pytest.mark.parametrize("error", [UserError("give a size."), KeyboardInterrupt()])
def test_one_rank_of_a_terminal_prints(
    error: BaseException,
    environment: dict[str, str],
    prints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_ranks(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        tool_that_raises(error)([])
    assert bool(capsys.readouterr().err) == prints


@pytest.mark.parametrize("lines", [1, 100_000])
def test_reader_that_leaves_ends_a_tool_without_a_traceback(lines: int) -> None:
    code = f"""
from vqd_scale.cli.base import Tool
main = Tool()
@main.command("")
def status() -> None:
    print("line\\n" * {lines})
main([])
"""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as output:
        completed = subprocess.run(
            [sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (completed.returncode, completed.stderr) == (141, "")


def test_broken_connection_keeps_its_traceback() -> None:
    with pytest.raises(ConnectionError):
        tool_that_raises(BrokenPipeError("the store has left"))([])


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        tool_that_raises(ZeroDivisionError())([])


def test_parameters_arrive_in_their_types() -> None:
    calls: list[object] = []
    main = Tool()

    @main.command("python tools/resize.py")
    def resize(
        images: Annotated[list[Path], typer.Argument()],
        size: Size,
        data: Annotated[Location | None, typer.Option(parser=location_from)] = None,
    ) -> None:
        """Record the parameters."""
        calls.extend([images, size, data])

    main(["a.png", "--height", "2", "b.png", "--data", "s3://bucket/key"])
    assert calls == [[Path("a.png"), Path("b.png")], Size(width=8, height=2), S3Path.parse("s3://bucket/key")]
    assert resize.__doc__
