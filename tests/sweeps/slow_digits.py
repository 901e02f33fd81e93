"""A task for sweeps under which nodes come and go: digits, which take their time without using the machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sweeps.tasks.digits import DigitsTask


class SlowDigitsTask(DigitsTask):
    """Digits that wait before a member's state is saved."""

    pause_s = 0.0

    def evaluate(self, members: int) -> list[dict[str, float]]:
        """As digits, later."""
        time.sleep(self.pause_s)
        return super().evaluate(members)


def make_task(*, cache: Path, device: torch.device, dtype: torch.dtype, pause_s: float) -> Any:
    """The entry point."""
    task = SlowDigitsTask.load(0, cache=cache, device=device, dtype=dtype)
    task.pause_s = pause_s
    return task
