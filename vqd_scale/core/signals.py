"""Signals set a flag; what to do about it is decided at a step boundary, by all ranks together."""

import signal
from types import FrameType

REQUEUE_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and saved itself: start it again and it goes on (EX_TEMPFAIL)."""

HUNG_EXIT_CODE = 76
"""Exit code of a run in which nothing happened any more; started again it goes on from its last save."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to save and leave."""


class StopFlag:
    """Becomes true at the first of `STOP_SIGNALS`."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
