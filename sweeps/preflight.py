"""Looks at the model and the data before anything is started: what only they can tell of a spec."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core import cost
from lora_core.adapter import Member
from lora_core.base import layer_widths
from lora_core.heads import find_heads
from lora_core.optimizers import PackOptimizer
from lora_core.targets import NoTargetError, find_targets
from sweeps.errors import SpecError, TaskError
from sweeps.recipe import bank_of, heads_of_task, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration, SearchSpace
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.tasks import Task, load_task

_TIMED_LR = 1e-6
"""Small enough for any model to stay finite; what a step costs does not depend on it."""

_TIMED_STEPS = 10
_WARM_STEPS = 3


@dataclass(frozen=True)
class Preflight:
    """A spec's task, loaded and found fit.

    Attributes:
        task: loaded on this machine.
        layers: (input width, output width) of each target layer.
        workers: jobs that can run at once on this machine.
    """

    task: Task
    layers: dict[str, tuple[int, int]]
    workers: int


def preflight(document: SpecDocument, reduction: Reduction, cache: Path) -> Preflight:
    """Loads a spec's task and holds the spec against it.

    Raises:
        SpecError: target modules, ranks, batch size or a task that the model or the data cannot serve.
    """
    spec = document.spec
    try:
        task = task_loader(cache)(spec)
    except TaskError as error:
        raise document.error(f"task.{error.path}", error.required, error.found, error.hint) from None
    try:
        targets = find_targets(task.model, spec.lora.target_modules, heads=heads_of_task(task))
    except NoTargetError as error:
        required = "names of linear layers of the model"
        raise document.error("lora.target_modules", required, _found(spec), str(error)) from None
    check_head(document, task)
    layers = {name: (layer.in_features, layer.out_features) for name, layer in targets.items()}
    faults = []
    narrowest = min(layers, key=lambda name: min(layers[name]))
    width = min(layers[narrowest])
    if max(reduction.space.ranks) > width:
        required = f"ranks of at most {width}, the width of {narrowest}"
        faults.append(document.fault("parameters.rank", required, str(max(reduction.space.ranks))))
    if spec.train.batch_size > task.n_samples:
        required = f"at most {task.n_samples}, the number of training samples"
        faults.append(document.fault("train.batch_size", required, str(spec.train.batch_size)))
    if faults:
        raise SpecError(document.source, tuple(faults))
    return Preflight(task, layers, workers=local_workers(spec))


def check_head(document: SpecDocument, task: Task) -> None:
    """Checks that a head has a learning rate, and that a learning rate has a head.

    Raises:
        SpecError: one is there without the other.
    """
    wanted = SearchSpace.of(document.spec).trains_head
    said = getattr(task, "heads", ())
    if said and not wanted:
        required = f"a learning rate for {', '.join(said)}, which this task trains whole"
        raise document.error("parameters.head_lr", required, "none", "such as {min: 1e-4, max: 1e-2}")
    if not wanted:
        return
    try:
        find_heads(task.model, heads_of_task(task))
    except ValueError as error:
        raise document.error("parameters.head_lr", "a task with a head", str(error), "or leave head_lr out") from None


def task_loader(cache: Path) -> Callable[[SweepSpec], Task]:
    """Loads the tasks of specs as `preflight` does: on the CPU."""
    return lambda spec: load_task(spec, cache=cache, device=torch.device("cpu"))


def seconds_per_member_step(spec: SweepSpec, reduction: Reduction, task: Task, pack: int) -> float:
    """Measures a full pack's step on this machine, one thread, and shares it out among its members, in seconds."""
    rank = max(reduction.space.ranks)
    head_lr = _TIMED_LR if reduction.space.trains_head else 0.0
    configuration = Configuration(rank, reduction.reference.at(rank), lr=_TIMED_LR, head_lr=head_lr)
    members = [Member(reduction.point(configuration), spec.train.seed)] * pack
    with one_thread(), bank_of(spec, task, members) as bank:
        optimizer = PackOptimizer(bank, optimizer_of(spec))
        stop = min(_WARM_STEPS + _TIMED_STEPS, spec.train.steps)
        ticks = [time.perf_counter()]
        for _ in steps_of(spec, task, optimizer, start=0, stop=stop):
            ticks.append(time.perf_counter())
    steps = sorted(after - before for before, after in itertools.pairwise(ticks))
    return steps[len(steps) // 2] / pack


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread, as a worker of several does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def local_workers(spec: SweepSpec) -> int:
    """How many jobs this machine runs at once: one a GPU, or one a core where there is no GPU."""
    if spec.compute.workers != "auto":
        return spec.compute.workers
    gpus, share = torch.cuda.device_count(), spec.compute.gpus_per_worker
    if gpus and share != 0:
        return max(1, int(gpus / (1.0 if share == "auto" else share)))
    # Not on macOS, which has no affinities.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _found(spec: SweepSpec) -> str:
    targets = spec.lora.target_modules
    return repr(targets) if isinstance(targets, str) else ", ".join(targets)


def most_members(spec: SweepSpec, fit: Preflight) -> int:
    """The largest pack that a worker's share of this machine's memory holds, at least 1."""
    targets = find_targets(fit.task.model, spec.lora.target_modules, heads=heads_of_task(fit.task))
    lookups = {name for name, target in targets.items() if target.kind == "embedding"}
    parameters = [*fit.task.model.parameters(), *fit.task.model.buffers()]
    itemsize = getattr(torch, spec.train.dtype).itemsize
    member = cost.member_bytes(
        cost.layer_shapes(layer_widths(fit.task.model, targets), set(targets), lookups),
        rank=max(SearchSpace.of(spec).ranks),
        rows=fit.task.most_rows(spec.train.batch_size),
        optimizer_states=spec.train.law.states_with(spec.train.settings),
        adapter_itemsize=max(4, itemsize),
        activation_itemsize=itemsize,
        dora=spec.lora.dora,
        dropout=spec.lora.dropout > 0,
    )
    base_bytes = sum(tensor.numel() * tensor.itemsize for tensor in parameters)
    return max(1, cost.pack_limit(_worker_memory_bytes(spec, fit.workers), base_bytes=base_bytes, member=member))


def _worker_memory_bytes(spec: SweepSpec, workers: int) -> int:
    share = spec.compute.gpus_per_worker
    if torch.cuda.is_available() and share != 0:
        return int(torch.cuda.get_device_properties(0).total_memory * (1.0 if share == "auto" else min(1.0, share)))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // (workers + 1)  # one share is the driver's
