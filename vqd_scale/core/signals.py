"""Signal handling: signals only set a flag, which all ranks evaluate together at a step boundary."""

import signal
from types import FrameType

REQUEUE_EXIT_CODE = 75
"""Exit code after a stop signal and a saved checkpoint; a restart resumes the run (EX_TEMPFAIL)."""

HUNG_EXIT_CODE = 76
"""Exit code of a run that hung; a restart resumes from the last checkpoint."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that request a checkpoint and an exit."""


class StopFlag:
    """Flag ``requested``, set by the first of `STOP_SIGNALS`."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
