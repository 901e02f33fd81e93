"""One job: a pack from one rung to the next, or a certificate. Needs torch and no Ray."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import load_member, save_member
from lora_core.optimizers import PackOptimizer
from sweeps.certifying import ClassOrder, certify
from sweeps.home import own_cache
from sweeps.jobs import JobErrorKind, JobOrder, JobResult, MemberOrder, MemberResult
from sweeps.recipe import bank_of, indices_of, lengths_of, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.secrecy import hide_passwords
from sweeps.spec import SweepSpec
from sweeps.storage import files_in
from sweeps.tasks import Task, load_task
from sweeps.tasks.compiled import compile_model

_MOST_LOSSES = 200
"""Training losses that a job reports of each member; longer jobs are thinned out."""

_OOM_SIGNS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""What a RuntimeError says where memory ran out."""


class JobRunner:
    """Does jobs, one after the other, over a task that stays loaded."""

    def __init__(self) -> None:
        self._loaded: tuple[str, Task] | None = None

    def run(self, order: JobOrder) -> JobResult:
        """Does one job. What goes wrong in it is part of its result, so that the actor lives on."""
        try:
            return self._run(order)
        except Exception as error:
            kind, detail = _kind(error), hide_passwords(traceback.format_exc())
        # Out of the handler, where the error and with it the frames that hold the pack's tensors are gone.
        if kind == "oom":
            let_go_of_memory()
        return JobResult(job=order.job, error=kind, detail=detail)

    def _run(self, order: JobOrder) -> JobResult:
        started_s = time.perf_counter()
        spec = SweepSpec.model_validate(order.spec)
        cache = Path(order.cache) if order.cache is not None else own_cache()
        task = self._task(spec, cache)
        setup_s = time.perf_counter() - started_s
        if order.work == "certify":
            member = order.members[0]
            wanted = ClassOrder(member.class_id, member.configuration, order.twins, member.trial)
            in_float64 = partial(load_task, cache=cache, device=device_here())
            (certificate,) = certify(spec, task, [wanted], steps=order.stop, in_float64=in_float64)
            train_s = time.perf_counter() - started_s - setup_s
            return JobResult(job=order.job, certificate=certificate.model_dump(), setup_s=setup_s, train_s=train_s)
        return train_members(spec, task, order).model_copy(update={"setup_s": setup_s})

    def _task(self, spec: SweepSpec, cache: Path) -> Task:
        key = f"{spec.task.model_dump_json()} {spec.train.dtype} {spec.train.seed}"
        if self._loaded is None or self._loaded[0] != key:
            task = load_task(spec, cache=cache, device=device_here())
            if spec.torch_compile:
                compile_model(task)
            self._loaded = (key, task)
        return self._loaded[1]


def device_here() -> torch.device:
    """Where a worker trains: the GPU that it was given, if any."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_members(spec: SweepSpec, task: Task, order: JobOrder) -> JobResult:
    """Trains the members of an order, measures them, and saves their states; results are in the order's own order."""
    reduction = Reduction.of(spec)
    members = [Member(reduction.point(m.configuration), spec.train.seed) for m in order.members]
    with bank_of(spec, task, members) as bank:
        optimizer = PackOptimizer(bank, optimizer_of(spec))
        for k, member in enumerate(order.members):
            if member.checkpoint is not None:
                state = load_member(files_in(order.checkpoints, member.checkpoint))
                bank.load_adapter(k, state.adapter)
                optimizer.load_state(k, state.optimizer)
        started_s = time.perf_counter()
        seen = _train(spec, task, optimizer, order.start, order.stop)
        trained_s = time.perf_counter()
        metrics = task.evaluate(len(members))
        if spec.metric.name not in metrics[0]:
            raise ValueError(
                f"the task must report metric.name, {spec.metric.name}; found {', '.join(metrics[0]) or 'nothing'}"
            )
        for k, member in enumerate(order.members):
            if k not in seen.diverged_at:
                save_member(
                    files_in(order.checkpoints, _checkpoint(member, order.stop)),
                    adapter=bank.adapter(k),
                    optimizer=optimizer.state(k),
                    step=order.stop,
                    extra={"trial": str(member.trial), **_said_of_the_model(bank)},
                )
        ended_s = time.perf_counter()
    results = tuple(
        MemberResult(
            trial=member.trial,
            diverged_at=seen.diverged_at.get(k),
            metrics={} if k in seen.diverged_at else metrics[k],
            train_losses=tuple((step, row[k]) for step, row in seen.losses if math.isfinite(row[k])),
            checkpoint=None if k in seen.diverged_at else _checkpoint(member, order.stop),
        )
        for k, member in enumerate(order.members)
    )
    return JobResult(
        job=order.job, members=results, train_s=trained_s - started_s, tokens=seen.tokens, eval_s=ended_s - trained_s
    )


def _said_of_the_model(bank: LoraBank) -> dict[str, str]:
    """What whoever reads a member's state has no model to ask for."""
    return {"fan_in_fan_out": json.dumps(bank.fan_in_fan_out), "heads": json.dumps(list(bank.heads))}


@dataclass(slots=True)
class _Seen:
    """What the training of a pack showed.

    Attributes:
        losses: (step, losses [K]), thinned out.
        diverged_at: the step at which each diverged member did so.
        tokens: trained on by all members that had not diverged; None where the task does not say.
    """

    losses: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    diverged_at: dict[int, int] = field(default_factory=dict)
    tokens: int | None = None


def _train(spec: SweepSpec, task: Task, optimizer: PackOptimizer, start: int, stop: int) -> _Seen:
    stride = math.ceil((stop - start) / _MOST_LOSSES)
    indices, lengths_S, accumulation = indices_of(spec, task), lengths_of(task), spec.train.accumulation
    seen = _Seen(tokens=None if lengths_S is None else 0)
    for record in steps_of(spec, task, optimizer, start=start, stop=stop):
        for k in record.diverged:
            seen.diverged_at.setdefault(k, record.step)
        if (record.step - start) % stride == 0 or record.step == stop:
            seen.losses.append((record.step, record.losses))
        if lengths_S is not None and seen.tokens is not None:
            batches = range((record.step - 1) * accumulation, record.step * accumulation)
            of_member = sum(int(lengths_S[indices(batch)].sum()) for batch in batches)
            seen.tokens += of_member * (len(record.losses) - len(record.diverged))
    return seen


def _checkpoint(member: MemberOrder, step: int) -> str:
    return f"trial-{member.trial:06d}/step-{step:08d}"


def _kind(error: Exception) -> JobErrorKind:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    # On the CPU, and inside of CUDA's libraries, torch has no class for it.
    return "oom" if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OOM_SIGNS) else "error"


def let_go_of_memory() -> None:
    """Gives back the memory of what is no longer used, a GPU's too, to whoever needs it next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
