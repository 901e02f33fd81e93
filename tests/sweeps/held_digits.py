"""A task for sweeps under which nodes come and go: digits, which wait where they are told to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from sweeps.tasks.digits import DigitsTask


class HeldDigitsTask(DigitsTask):
    """Digits that do not get past their evaluation, and so not to the end of a job, while a file is there."""

    hold = Path()

    def evaluate(self, members: int) -> list[dict[str, float]]:
        """As digits, once the file is gone."""
        while self.hold.exists():
            self.hold.with_name(f"held-{os.getpid()}").touch()
            time.sleep(0.05)
        return super().evaluate(members)


def make_task(*, cache: Path, device: torch.device, dtype: torch.dtype, hold: str) -> HeldDigitsTask:
    """The entry point."""
    task = HeldDigitsTask.load(0, cache=cache, device=device, dtype=dtype)
    assert isinstance(task, HeldDigitsTask)
    task.hold = Path(hold)
    return task
