"""What is trained: a frozen model, data, and what they are measured by.

A task is built from its section of the spec by `load_task`. To add one: a model in the union of `sweeps/spec.py`, a
file here with a class that follows `Task`, and a line in `load_task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sweeps.spec import SweepSpec


class Task(Protocol):
    """What training asks of a task. Every method treats the pack's rows as member-major: member 0's rows first."""

    @property
    def model(self) -> nn.Module:
        """The frozen base model, on the task's device, without adapters."""

    @property
    def n_samples(self) -> int:
        """Size of the training set."""

    @property
    def data(self) -> Mapping[str, Tensor]:
        """All that is trained and evaluated on, by name: what a certificate takes the hash of."""

    def most_rows(self, batch_size: int) -> int:
        """The most rows that a member brings to a layer at once, in training or in evaluation."""

    def losses_K(self, indices: Tensor, members: int) -> Tensor:
        """Mean training loss of each member [K], over the same samples for all, with the graph to the adapters.

        Args:
            indices: samples of this step [batch_size], int64.
            members: K.
        """

    def evaluate(self, members: int) -> list[dict[str, float]]:
        """What the task reports of each member, on the held-out set, by metric name."""


def load_task(spec: SweepSpec, *, cache: Path, device: torch.device) -> Task:
    """Builds the task of a spec.

    Args:
        spec: the sweep's spec.
        cache: directory for what is costly to make and can be made again.
        device: where the model and the data are put.
    """
    from sweeps.tasks.digits import DigitsTask

    return DigitsTask.load(spec.task.base_seed, cache=cache, device=device, dtype=getattr(torch, spec.train.dtype))
