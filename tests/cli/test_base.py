"""Exit codes and messages of a tool, and groups of options."""

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
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("sys.argv", ["tools/resize.py"])
    with pytest.raises(SystemExit) as end:
        tool_that_raises(error)([])
    assert end.value.code == code
    assert capsys.readouterr().err == (f"resize.py{message}" if message else "")


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
