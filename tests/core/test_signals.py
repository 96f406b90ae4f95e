import os
import signal
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from vqd_scale.core.signals import PROGRESS_FILE, StopFlag, report_progress


@pytest.fixture
def flag() -> Generator[StopFlag]:
    flag = StopFlag()
    yield flag
    flag.close()


def test_first_interrupt_asks_and_a_later_one_interrupts(
    flag: StopFlag, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert flag.received == signal.SIGINT
    assert "Ctrl-C again: at once" in capfd.readouterr().err
    # torchrun forwards the Ctrl-C that the terminal has delivered.
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    later = time.monotonic() + 2
    monkeypatch.setattr("vqd_scale.core.signals.time.monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_request_passes_to_the_next_flag_and_ends_with_the_first(flag: StopFlag) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    inner = StopFlag()
    assert inner.received == signal.SIGUSR2
    inner.close()
    flag.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not StopFlag().requested


def test_progress_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_progress()
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    report_progress()
    (tmp_path / "progress").unlink()
    report_progress()
    assert not (tmp_path / "progress").exists()
