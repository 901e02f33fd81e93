"""What is asked for again and again until a sweep has come to its end, here or at a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from services.schemas import ENDED, LogPart, SweepStatus


def follow_logs(
    logs: Callable[[str, int | None], LogPart],
    status: Callable[[str], SweepStatus],
    sweep: str,
    offset: int | None,
    *,
    every_s: float,
) -> Iterator[LogPart]:
    """A sweep's log from an offset on, and what is added to it until the sweep has come to its end.

    Args:
        logs: reads a stretch from an offset on; None: the end of it.
        status: how the sweep stands.
        sweep: its id.
        offset: where to begin.
        every_s: how long to wait where there is nothing new.
    """
    over = False
    while True:
        part = logs(sweep, offset)
        offset = part.next
        if part.text:
            yield part
        elif over:
            return
        else:
            # What it wrote last may have come after we looked: once more.
            over = status(sweep).state in ENDED
            if not over:
                time.sleep(every_s)
