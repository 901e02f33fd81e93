"""A task of one's own, for `task: python`: a network learns what another does that differs by a matrix of rank 2.

docs/tasks.md says what a task must be.

    suffix  meaning
    K       members of a pack
    N       samples of a batch
    D       inputs of a sample
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn


class TeacherTask:
    """A frozen network, adapted to what its teacher makes of the same inputs."""

    def __init__(self, model: nn.Module, x_ND: Tensor, y_N: Tensor) -> None:
        self.model = model
        self._train = x_ND[::2], y_N[::2]
        self._held_out = x_ND[1::2], y_N[1::2]
        self.n_samples = len(self._train[0])

    @property
    def data(self) -> dict[str, Tensor]:
        """What a certificate takes the hash of."""
        names = ("x", "y", "held-out x", "held-out y")
        return dict(zip(names, (*self._train, *self._held_out), strict=True))

    def most_rows(self, batch_size: int) -> int:
        """Rows that a member brings to a layer at once: the batch, or the whole held-out set."""
        return max(batch_size, len(self._held_out[0]))

    def losses_K(self, indices: Tensor, members: int) -> Tensor:
        """The same samples for every member; each gets the mean over its own rows."""
        x_ND, y_N = self._train
        return self._errors_KN(x_ND[indices], y_N[indices], members).mean(dim=1)

    @torch.no_grad()
    def evaluate(self, members: int) -> list[dict[str, float]]:
        """What the spec calls metrics, of each member."""
        errors_K = self._errors_KN(*self._held_out, members).mean(dim=1)
        return [{"eval/loss": error} for error in errors_K.tolist()]

    def _errors_KN(self, x_ND: Tensor, y_N: Tensor, members: int) -> Tensor:
        # Member-major: all rows of member 0, then all of member 1, and so on.
        predicted = self.model(x_ND.repeat(members, 1)).view(members, -1)
        return (predicted - y_N).square()


def make_task(*, cache: Path, device: torch.device, dtype: torch.dtype, change: float = 0.5) -> TeacherTask:
    """What the entrypoint names: called once a worker, with the spec's `options` beside what lora-sweeps passes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every worker must make the same model and data
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        teacher = copy.deepcopy(model)
        x_ND, b_OR, a_RI = torch.randn(512, 8), torch.randn(64, 2), torch.randn(2, 64)
    with torch.no_grad():
        teacher[2].weight += change / 8 * (b_OR @ a_RI)
        y_N = teacher(x_ND)[:, 0]
    model = model.to(device, dtype).requires_grad_(False).eval()
    return TeacherTask(model, x_ND.to(device, dtype), y_N.to(device, dtype))
