"""Progress on stderr while a sweep runs, here or at a service. Light: no torch, no database."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

import click

from sweeps.best import counts_in_words
from sweeps.events import Event, JobEnded, JobStarted, RungReported, SweepExtended, TrialAsked, TrialTold

_LINE_EVERY_S = 2.0


class Watcher:
    """Progress on stderr: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began_s = self._last_s = time.monotonic()
        self._told: Counter[str] = Counter()
        self._asked = self._steps = 0
        self._certificates = 0
        self._best: str = ""
        self._tokens, self._train_s = 0, 0.0

    def stage(self, text: str) -> None:
        """A new stage."""
        self._show(text, final=not self._terminal)

    def share(self, what: str, done: int, of: int) -> None:
        """How much of a long piece of work is done."""
        self.count(f"{what} {done:,} of {of:,} steps ({100 * done / of:.0f} %)")

    def count(self, text: str) -> None:
        """Something that changes often."""
        now_s = time.monotonic()
        if self._terminal or now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            self._show(text, final=not self._terminal)

    def events(self, sweep: str, events: Sequence[Event]) -> None:
        """Counts what happened and shows it."""
        for event in events:
            match event:
                case TrialAsked() if event.duplicate_of is None:
                    self._asked += 1
                case TrialTold():
                    self._told[event.state] += 1
                case RungReported():
                    self._steps = max(self._steps, event.step)
                case JobEnded() if event.tokens is not None:
                    self._tokens += event.tokens
                    self._train_s += event.train_s
                case JobStarted() if event.work == "certify":
                    self._certificates += 1
                case SweepExtended():
                    self._certificates = 0  # trials come first again
                case _:
                    pass
        now_s = time.monotonic()
        if self._asked and (self._terminal or now_s - self._last_s >= _LINE_EVERY_S):
            self._last_s = now_s
            self._show(f"{sweep}: {self._line()}", final=not self._terminal)

    def close(self) -> None:
        """Clears the line."""
        if self._terminal:
            click.echo("\r\033[K", nl=False, err=True)

    def _line(self) -> str:
        if self._certificates:
            return f"certificate {self._certificates}"
        under_way = self._asked - self._told.total()
        ended = f"; {counts_in_words(self._told)}" if self._told else ""
        speed = f"; {self._tokens / self._train_s:,.0f} tokens/s a worker" if self._tokens else ""
        return f"{self._asked} trials asked, {under_way} under way{ended}{speed}"

    def _show(self, text: str, *, final: bool) -> None:
        line = f"[{time.monotonic() - self._began_s:5.1f} s] {text}"
        click.echo(line if final else f"\r\033[K{line}", nl=final, err=True)
