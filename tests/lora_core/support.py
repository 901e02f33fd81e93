"""A small model, its data, and one way to train members on it: solo, packed, from the start or from the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.profiler import profile

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import FactorSettings, Point
from lora_core.laws import Constant
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, StepRecord, batch_indices, train_pack
from lora_core.trajectory import Trajectory, record_trajectories

TARGETS = ("fc1", "fc2")
SAMPLES, BATCH, WIDTH = 96, 16, 24


class Mlp(nn.Module):
    """12 -> 24 -> 24 -> 5."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, WIDTH, dtype=dtype)
        self.fc2 = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, 5, dtype=dtype)
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                values = torch.rand(parameter.shape, generator=draws, dtype=torch.float64) - 0.5
                parameter.copy_(values * 2 / parameter.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def samples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs [SAMPLES, 12] and labels [SAMPLES]."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 12, generator=draws, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 5, (SAMPLES,), generator=draws)


def make_point(
    *,
    rank: int = 4,
    scaling: float = 2.0,
    init_scale: float = 1.0,
    lr: float = 1e-2,
    lr_b: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    constants: Mapping[str, Constant] | None = None,
) -> Point:
    """A point; `constants` are those beside eps."""
    a = FactorSettings(lr, weight_decay, {"eps": eps, **(constants or {})})
    b = replace(a, lr=lr if lr_b is None else lr_b)
    return Point(rank, scaling, init_scale, a, b, clip_norm)


def losses_of(model: nn.Module, members: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensor]:
    x, y = samples(dtype)

    def losses_K(step: int) -> Tensor:
        rows = batch_indices(SAMPLES, BATCH, step, seed=0)
        logits = model(x[rows].repeat(members, 1))
        nats = nn.functional.cross_entropy(logits, y[rows].repeat(members), reduction="none")
        return nats.view(members, BATCH).mean(dim=1)

    return losses_K


class Pack:
    """Members over a fresh model, ready to train."""

    def __init__(
        self,
        members: Sequence[Member],
        config: OptimizerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        schedule: Schedule | None = None,
        model: nn.Module | None = None,
        heads: Sequence[str] = (),
    ) -> None:
        self.model = Mlp(dtype) if model is None else model
        self.bank = LoraBank.attach(self.model, TARGETS, members, heads=heads)
        self.optimizer = PackOptimizer(self.bank, config)
        self.losses_K = losses_of(self.model, len(members), dtype)
        self.schedule = schedule or Schedule("cosine", steps=60, warmup_steps=6)

    def train(self, start: int, stop: int) -> list[StepRecord]:
        return list(self._steps(start, stop))

    def trajectories(self, start: int, stop: int) -> tuple[Trajectory, ...]:
        return record_trajectories(self.bank, self._steps(start, stop))

    def _steps(self, start: int, stop: int):
        return train_pack(self.bank, self.optimizer, self.losses_K, start=start, stop=stop, schedule=self.schedule)


def profiled_peak(work: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator had given out at once, as the profiler recorded it."""
    with profile(profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
