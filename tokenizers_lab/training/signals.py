"""SIGTERM and SIGINT set a flag that the loop reads at the next step boundary; a second SIGINT interrupts at once."""

import signal
import threading
import types
from types import FrameType


class StopFlag:
    """Context manager that turns the two signals into `flag.raised` (the signal's number, 0: none)."""

    def __init__(self) -> None:
        self.raised = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: types.TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)      # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = number
