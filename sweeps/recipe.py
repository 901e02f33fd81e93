"""How a spec's trials are trained, in the terms of lora_core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from lora_core.adapter import LoraBank, Member
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, StepRecord, batch_indices, train_pack
from sweeps.spec import SweepSpec
from sweeps.tasks import Task


def bank_of(spec: SweepSpec, task: Task, members: Sequence[Member]) -> LoraBank:
    """Attaches a pack to a task's model, as the spec says; see `LoraBank.attach`."""
    heads = heads_of_task(task)
    return LoraBank.attach(task.model, spec.lora.target_modules, members, init=spec.lora.init, heads=heads)


def heads_of_task(task: Task) -> Sequence[str] | None:
    """Names of the modules that a task would have trained whole; None where it leaves that to PEFT's rule."""
    heads: Sequence[str] | None = getattr(task, "heads", None)
    return heads


def steps_of(spec: SweepSpec, task: Task, optimizer: PackOptimizer, *, start: int, stop: int) -> Iterator[StepRecord]:
    """Trains a pack from one step to another, as the spec says; see `train_pack`."""
    return train_pack(
        optimizer.bank,
        optimizer,
        losses_of(spec, task, members=len(optimizer.bank.members)),
        start=start,
        stop=stop,
        schedule=schedule_of(spec),
        accumulation=spec.train.accumulation,
    )


def losses_of(spec: SweepSpec, task: Task, *, members: int) -> Callable[[int], torch.Tensor]:
    """The losses of a pack [K] as a function of the batch's number, over the spec's data order."""

    indices = indices_of(spec, task)

    def losses_K(batch: int) -> torch.Tensor:
        return task.losses_K(indices(batch), members)

    return losses_K


def indices_of(spec: SweepSpec, task: Task) -> Callable[[int], torch.Tensor]:
    """The samples of a batch [batch_size] as a function of its number: the spec's data order."""
    train = spec.train
    lengths_S = lengths_of(task) if spec.group_by_length else None

    def indices(batch: int) -> torch.Tensor:
        return batch_indices(
            task.n_samples, train.batch_size, batch, train.seed, lengths_S=lengths_S, accumulation=train.accumulation
        )

    return indices


def lengths_of(task: Task) -> torch.Tensor | None:
    """Tokens of each sample [S]; None for a task that does not say."""
    lengths_S: torch.Tensor | None = getattr(task, "lengths_S", None)
    return lengths_S


def optimizer_of(spec: SweepSpec) -> OptimizerConfig:
    """The kind of optimizer that a spec asks for."""
    return OptimizerConfig(spec.train.optimizer, spec.train.settings)


def schedule_of(spec: SweepSpec) -> Schedule:
    """The learning-rate schedule that a spec asks for."""
    return Schedule(spec.train.schedule, spec.train.steps, spec.train.warmup_steps)
