"""One job: a pack from one rung to the next, or a certificate. Needs torch and no Ray."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import load_member, save_member
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, batch_indices, train_pack
from lora_core.trajectory import Trajectory, compare, record_trajectories
from sweeps.collapse import CONTROLS, Certificate, TwinVerdict
from sweeps.jobs import JobErrorKind, JobOrder, JobResult, MemberOrder, MemberResult
from sweeps.reduction import Reduction
from sweeps.secrecy import hide_passwords
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.tasks import Task, load_task

_MOST_LOSSES = 200
"""Training losses that a job reports of each member; longer jobs are thinned out."""


class JobRunner:
    """Does jobs, one after the other, over a task that stays loaded."""

    def __init__(self) -> None:
        self._loaded: tuple[str, Task] | None = None

    def run(self, order: JobOrder) -> JobResult:
        """Does one job. What goes wrong in it is part of its result, so that the actor lives on."""
        try:
            return self._run(order)
        except Exception as error:
            return JobResult(job=order.job, error=_kind(error), detail=hide_passwords(traceback.format_exc()))

    def _run(self, order: JobOrder) -> JobResult:
        started_s = time.perf_counter()
        spec = SweepSpec.model_validate(order.spec)
        task = self._task(spec, Path(order.cache))
        setup_s = time.perf_counter() - started_s
        if order.work == "certify":
            certificate = certify(spec, task, order.members[0], order.twins, steps=order.stop)
            train_s = time.perf_counter() - started_s - setup_s
            return JobResult(job=order.job, certificate=certificate.model_dump(), setup_s=setup_s, train_s=train_s)
        members, train_s, eval_s = train_members(spec, task, order)
        return JobResult(job=order.job, members=members, setup_s=setup_s, train_s=train_s, eval_s=eval_s)

    def _task(self, spec: SweepSpec, cache: Path) -> Task:
        key = f"{spec.task.model_dump_json()} {spec.train.dtype}"
        if self._loaded is None or self._loaded[0] != key:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = (key, load_task(spec, cache=cache, device=device))
        return self._loaded[1]


def train_members(spec: SweepSpec, task: Task, order: JobOrder) -> tuple[tuple[MemberResult, ...], float, float]:
    """Trains the members of an order, measures them, and saves their states.

    Returns:
        The results in the order's own order, and the seconds spent on training and on evaluation.
    """
    reduction, checkpoints = Reduction.of(spec), Path(order.checkpoints)
    members = [Member(reduction.point(m.configuration), spec.train.seed) for m in order.members]
    with LoraBank.attach(task.model, spec.lora.target_modules, members, init=spec.lora.init) as bank:
        optimizer = PackOptimizer(bank, optimizer_of(spec))
        for k, member in enumerate(order.members):
            if member.checkpoint is not None:
                state = load_member(checkpoints / member.checkpoint)
                bank.load_adapter(k, state.adapter)
                optimizer.load_state(k, state.optimizer)
        started_s = time.perf_counter()
        losses, diverged_at = _train(spec, task, optimizer, order.start, order.stop)
        trained_s = time.perf_counter()
        metrics = task.evaluate(len(members))
        for k, member in enumerate(order.members):
            if k not in diverged_at:
                save_member(
                    checkpoints / _checkpoint(member, order.stop),
                    adapter=bank.adapter(k),
                    optimizer=optimizer.state(k),
                    step=order.stop,
                    extra={"trial": str(member.trial)},
                )
        ended_s = time.perf_counter()
    results = tuple(
        MemberResult(
            trial=member.trial,
            diverged_at=diverged_at.get(k),
            metrics={} if k in diverged_at else metrics[k],
            train_losses=tuple((step, row[k]) for step, row in losses if math.isfinite(row[k])),
            checkpoint=None if k in diverged_at else _checkpoint(member, order.stop),
        )
        for k, member in enumerate(order.members)
    )
    return results, trained_s - started_s, ended_s - trained_s


def certify(
    spec: SweepSpec, task: Task, member: MemberOrder, twins: Sequence[Configuration], *, steps: int
) -> Certificate:
    """Trains a representative, its twins and its control runs, and compares them.

    Each runs alone: in a pack, a member's place can change the last bits of its matrix products, and the proof is about
    alpha, not about places.
    """
    reduction = Reduction.of(spec)

    def run(configuration: Configuration, perturbation_seed: int | None = None) -> Trajectory:
        lone = Member(reduction.point(configuration), spec.train.seed, perturbation_seed)
        with LoraBank.attach(task.model, spec.lora.target_modules, [lone], init=spec.lora.init) as bank:
            losses_K = losses_of(spec, task, members=1)
            records = train_pack(
                bank, PackOptimizer(bank, optimizer_of(spec)), losses_K, start=0, stop=steps, schedule=schedule_of(spec)
            )
            layers.extend(name for name in bank.layers if name not in layers)
            return record_trajectories(bank, records)[0]

    layers: list[str] = []
    representative = run(member.configuration)
    controls = [run(member.configuration, seed) for seed in range(1, CONTROLS + 1)]
    eps = torch.finfo(getattr(torch, spec.train.dtype)).eps
    verdicts = []
    for twin in twins:
        trajectory = run(twin)
        verdict = compare(representative, trajectory, controls, eps=eps)
        verdicts.append(
            TwinVerdict(
                configuration=twin,
                exact_in_binary=reduction.gauge_between(member.configuration, twin).exact_in_binary,
                verdict=verdict.kind,
                max_ratio=verdict.max_ratio,
                first_step=verdict.first_step,
                losses=tuple(trajectory.losses.tolist()),
                update_norms=_by_layer(trajectory, layers),
            )
        )
    return Certificate(
        class_id=member.class_id,
        trial=member.trial,
        steps=steps,
        representative=member.configuration,
        losses=tuple(representative.losses.tolist()),
        update_norms=_by_layer(representative, layers),
        controls=len(controls),
        twins=tuple(verdicts),
    )


def _train(
    spec: SweepSpec, task: Task, optimizer: PackOptimizer, start: int, stop: int
) -> tuple[list[tuple[int, tuple[float, ...]]], dict[int, int]]:
    """Trains a pack; returns (step, losses [K]) thinned out, and the step at which each diverged member did so."""
    stride = math.ceil((stop - start) / _MOST_LOSSES)
    losses: list[tuple[int, tuple[float, ...]]] = []
    diverged_at: dict[int, int] = {}
    losses_K = losses_of(spec, task, members=len(optimizer.bank.members))
    for record in train_pack(optimizer.bank, optimizer, losses_K, start=start, stop=stop, schedule=schedule_of(spec)):
        for k in record.diverged:
            diverged_at.setdefault(k, record.step)
        if (record.step - start) % stride == 0 or record.step == stop:
            losses.append((record.step, record.losses))
    return losses, diverged_at


def losses_of(spec: SweepSpec, task: Task, *, members: int) -> Callable[[int], torch.Tensor]:
    """The losses of a pack [K] as a function of the batch's number, over the spec's data order."""

    def losses_K(batch: int) -> torch.Tensor:
        return task.losses_K(batch_indices(task.n_samples, spec.train.batch_size, batch, spec.train.seed), members)

    return losses_K


def optimizer_of(spec: SweepSpec) -> OptimizerConfig:
    """The kind of optimizer that a spec asks for."""
    return OptimizerConfig(spec.train.optimizer, spec.train.settings)


def schedule_of(spec: SweepSpec) -> Schedule:
    """The learning-rate schedule that a spec asks for."""
    return Schedule(spec.train.schedule, spec.train.steps, spec.train.warmup_steps)


def _by_layer(trajectory: Trajectory, layers: Sequence[str]) -> dict[str, tuple[float, ...]]:
    columns = zip(layers, trajectory.update_norms.T.tolist(), strict=True)
    return {name: tuple(column) for name, column in columns}


def _checkpoint(member: MemberOrder, step: int) -> str:
    return f"trial-{member.trial:06d}/step-{step:08d}"


def _kind(error: Exception) -> JobErrorKind:
    return "oom" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "error"
