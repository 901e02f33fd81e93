"""Ctrl-C and SIGTERM, turned into one exception at a moment when it does no harm.

The first signal ends the sweep in order. A second one gives the signals back to the system, so that a third kills.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Somebody pressed Ctrl-C or sent SIGTERM.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Interrupts:
    """Raises `Interrupted` for the first signal, at once or where it is next looked for.

    Ray's own code must not be interrupted by an exception: it loses it, or reports an error of its own in its place. So
    around calls of Ray signals are `held`, and looked for with `check` where our own code has the word.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self._raised = False
        self._holding = False

    @property
    def signal(self) -> int | None:
        """The first signal that came."""
        return self._caught

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come and has not been raised yet."""
        if self._caught is not None and not self._raised:
            self._raised = True
            raise Interrupted(self._caught)

    @contextlib.contextmanager
    def held(self, hold: bool = True) -> Iterator[None]:
        """Keeps signals for `check`; with `hold=False`, raises them at once again within a held stretch."""
        before, self._holding = self._holding, hold
        try:
            if not hold:
                self.check()
            yield
        finally:
            self._holding = before

    @contextlib.contextmanager
    def watching(self) -> Iterator[Interrupts]:
        """Installs the handlers for as long as the context lasts; in a thread other than the main one, does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.rearm()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def rearm(self) -> None:
        """Installs the handlers again: `ray.init` puts its own in place of SIGTERM's."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._caught is None:
            self._caught = number
            if not self._holding:
                self.check()
            return
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        os.write(2, b"\nending in order; once more kills\n")
