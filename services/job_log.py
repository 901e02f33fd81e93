"""A driver's output as a Ray job's log has it, stdout and stderr in one: what is progress, and what the outcome.

    progress   all lines but what follows
    BEGIN      a line; after it the outcome in words, as `run` prints it
    AS_JSON    begins a line that ends with the outcome as JSON; after it come notes, which are progress again

The words are there for whoever reads the log elsewhere, in Ray's dashboard say; the JSON is one line, written at once,
so that nothing else can stand within it. Before either mark may stand what another writer has left of a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from services.ray_client import RAYS_OWN_LINES

BEGIN = "--- outcome"
AS_JSON = "--- outcome as JSON: "


class JobLog:
    """Reads a log that grows, from wherever a connection begins to tell it."""

    def __init__(self, show: Callable[[str], None]) -> None:
        """Has read nothing yet.

        Args:
            show: is given each line of progress.
        """
        self._show = show
        self._known = 0
        self._rest = ""
        self._words: list[str] | None = None
        self.outcome: dict[str, Any] | None = None

    @property
    def words(self) -> str | None:
        """The outcome in words; None where the log has none, or not all of it."""
        return None if self._words is None or self.outcome is None else "\n".join(self._words)

    def read(self, start: int, text: str) -> int:
        """Takes a piece of the log, of which any part may be known already.

        Args:
            start: characters of the log that come before it.
            text: the piece.

        Returns:
            The characters up to its end.
        """
        end = start + len(text)
        if end > self._known:
            *lines, self._rest = (self._rest + text[self._known - start :]).split("\n")
            self._known = end
            for line in lines:
                self._take(line)
        return end

    def close(self) -> None:
        """Takes what is left, for there comes no more."""
        if self._rest:
            self._take(self._rest)
        self._rest = ""

    def _take(self, line: str) -> None:
        before, _, rest = line.partition(AS_JSON)
        if (outcome := _outcome(rest)) is not None:
            self.outcome = outcome
        elif line.endswith(BEGIN):
            self._words, self.outcome, before = [], None, line.removesuffix(BEGIN)
        elif any(own in line for own in RAYS_OWN_LINES):
            return
        elif self._words is not None and self.outcome is None:
            self._words.append(line)
            return
        else:
            before = line
        if before or line == "":
            self._show(before)


def _outcome(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
