"""What training asks of a task. docs/tasks.md says it to those who write their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class Task(Protocol):
    """What training asks of a task. Every method treats the pack's rows as member-major: member 0's rows first.

    A task of sequences says one thing more, which others leave out: `lengths_S`, the tokens of each training sample
    [n_samples], padding not counted, int64, on the CPU, the same tensor each time. By it tokens a second are told, and
    batches made of samples of like length.
    """

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
