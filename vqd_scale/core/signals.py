"""Signal handling: signals only set a flag, which all ranks evaluate together at a step boundary."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

from vqd_scale.core.environment import place_among_ranks

REQUEUE_EXIT_CODE = 75
"""Exit code after a stop signal and a saved checkpoint; a restart resumes the run (EX_TEMPFAIL)."""

HUNG_EXIT_CODE = 76
"""Exit code of a run that hung; a restart resumes from the last checkpoint."""

TIME_LIMIT_SIGNAL = signal.SIGUSR2
"""Signal that announces a job's time limit."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, TIME_LIMIT_SIGNAL)
"""Signals that request a checkpoint and an exit."""

PROGRESS_FILE = "VQD_PROGRESS_FILE"
"""Environment variable: path of the file that tells the launcher of a failed start that work was done."""

_SAME_INTERRUPT_SECONDS = 1.0


class StopFlag:
    """Flag that is set by the first of `STOP_SIGNALS` or by Ctrl-C; a second Ctrl-C interrupts at once.

    A flag takes over the signals, and a request, from the flag that handled them before.

    Attributes:
        received: First signal; None before.
    """

    def __init__(self) -> None:
        self._handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
        outer = getattr(self._handlers[signal.SIGTERM], "__self__", None)
        self.received: int | None = outer.received if isinstance(outer, StopFlag) else None
        self._interrupted: float | None = outer._interrupted if isinstance(outer, StopFlag) else None
        for number in self._handlers:
            signal.signal(number, self._on_signal)

    @property
    def requested(self) -> bool:
        """True after a signal."""
        return self.received is not None

    def close(self) -> None:
        """Restore the handlers from before this flag."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if place_among_ranks()[0] == 0:
                    os.write(2, b"\nstopping at the next step, with a checkpoint; Ctrl-C again: at once\n")
            # The terminal and the launcher may both deliver the same Ctrl-C.
            elif now - self._interrupted > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
        self.received = self.received or number


def report_progress() -> None:
    """Create the `PROGRESS_FILE`, if the launcher named one: a part of the work is done."""
    if path := os.environ.pop(PROGRESS_FILE, None):
        Path(path).touch()
