"""Where a driver's wall time goes, by stage."""

from __future__ import annotations

import time


class Clock:
    """Books the time between laps on stages; what runs beside them is added."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since_s = time.perf_counter()

    def lap(self, stage: str, *, ago_s: float = 0.0) -> None:
        """Books the time since the last lap, up to `ago_s` seconds ago, on a stage."""
        until_s = max(self._since_s, time.perf_counter() - ago_s)
        self.add(stage, until_s - self._since_s)
        self._since_s = until_s

    def add(self, stage: str, seconds: float) -> None:
        """Books time on a stage that runs beside others."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
