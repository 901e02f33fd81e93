"""Looks at the model and the data before anything is started: what only they can tell of a spec.

A model too large to be tried out here is looked at without its weights, on the meta device: its layers, the data, and
the memory of a member are known all the same; what a step takes is not.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_core import cost, memory
from lora_core.adapter import Member
from lora_core.base import layer_widths
from lora_core.optimizers import PackOptimizer
from lora_core.targets import find_targets
from lora_core.train import batch_indices
from sweeps.errors import TaskError
from sweeps.recipe import bank_of, heads_of_task, lengths_of, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.task_faults import not_packable, targets_of
from sweeps.tasks import Task, base_bytes, load_task, most_on_one_gpu
from sweeps.tasks.compiled import check_compiler
from sweeps.tasks.spread import gpus_of

_TIMED_LR = 1e-6
"""Small enough for any model to stay finite; what a step costs does not depend on it."""

_TIMED_STEPS = 10
_WARM_STEPS = 3
_TIMED_S = 20
"""Timing ends after so long, with what has been timed by then: one step and one to warm up at least."""

_MOST_FLOPS = 3e12
"""Of what is tried out on the CPU: about a minute on one core."""

_RESERVE = 0.1
_RESERVE_ON_CPU = 0.25
"""The share of a worker's memory that a pack leaves alone."""

_MOST_LOADED = 0.5
"""The share of a worker's memory that a base model may take to be loaded for trying out."""


@dataclass(frozen=True)
class Preflight:
    """A spec's task, looked at and found fit.

    Attributes:
        task: loaded on this machine; without weights where it is too large for that.
        outline: the same without weights, where counting memory with them would take long; else `task`.
        layers: (input width, output width) of each target layer.
        workers: jobs that can run at once on this machine.
        memory_bytes: a worker's share of this machine's memory; None where the workers must be on others.
        step_flops: of one member, nearly.
        too_large: why the weights were not loaded; empty where they were.
        gpus: how many of this machine's GPUs a worker spreads the model over; 1 also where it trains on none.
        most_bytes: of the base model on that one of them which has the most of it.
        on_gpu: whether workers train on GPUs.
    """

    task: Task
    outline: Task
    layers: dict[str, tuple[int, int]]
    workers: int
    memory_bytes: int | None
    step_flops: int
    too_large: str
    gpus: int = 1
    most_bytes: int = 0
    on_gpu: bool = False


def preflight(document: SpecDocument, reduction: Reduction, cache: Path, *, whole: bool = True) -> Preflight:
    """Loads a spec's task and holds the spec against it.

    Args:
        document: the spec.
        reduction: its reduction.
        cache: for what the task keeps.
        whole: whether the task is there to be trained: on the CPU, with its weights, whatever they take. Otherwise it
            is loaded where a worker on this machine would have it, and without weights if they are too large.

    Raises:
        SpecError: target modules, ranks, batch size, adapters or a task that the model or the data cannot serve.
    """
    spec, workers = document.spec, local_workers(document.spec)
    device = torch.device("cpu" if whole or not _trains_on_gpu(spec) else "cuda")
    share, too_large, meta = _memory_bytes(spec, workers, device), "", torch.device("meta")
    try:
        size = None if whole else base_bytes(spec)
        if size is not None and size > _MOST_LOADED * share:
            place = "GPU" if device.type == "cuda" else "CPU"
            too_large = (
                f"the base model takes {_gb(size)}, more than half of the {_gb(share)} that a worker has on this "
                f"machine's {place}"
            )
        task = load_task(spec, cache=cache, device=meta if too_large else device)
        if spec.torch_compile and not whole and (device.type == "cuda" or not _asks_for_gpus(spec)):
            check_compiler(device)  # else whoever compiles has a machine of its own
        targets = targets_of(document, reduction, task)
        flops = _step_flops(spec, task)
        long = size is not None and device.type == "cpu" and not too_large and flops > _MOST_FLOPS
        outline = load_task(spec, cache=cache, device=meta) if long else task
        gpus = gpus_of(spec, device)
        model_bytes = memory.base_bytes(task.model)
        most_bytes = model_bytes if gpus == 1 else most_on_one_gpu(task.model, [share // gpus] * gpus)
    except TaskError as error:
        raise document.error(f"task.{error.path}", error.required, error.found, error.hint) from None
    elsewhere = device.type == "cpu" and size is not None and (size > share or _asks_for_gpus(spec))
    layers = {name: (layer.in_features, layer.out_features) for name, layer in targets.items()}
    return Preflight(
        task,
        outline,
        layers,
        workers,
        None if elsewhere else share,
        flops,
        too_large,
        gpus,
        most_bytes,
        device.type == "cuda",
    )


def on_cluster(document: SpecDocument, fit: Preflight, memory_bytes: int | None, gpus: float) -> Preflight:
    """What was found, for workers on other machines.

    Args:
        document: the spec.
        fit: what was found of it here.
        memory_bytes: of each worker, at least, its GPUs' together; None where that is not known.
        gpus: of each worker.

    Raises:
        SpecError: its GPUs do not hold the model.
    """
    spread = max(1, int(gpus))
    most_bytes = memory.base_bytes(fit.task.model)
    if spread > 1 and memory_bytes is not None:
        try:
            most_bytes = most_on_one_gpu(fit.task.model, [memory_bytes // spread] * spread)
        except TaskError as error:
            raise document.error(f"task.{error.path}", error.required, error.found, error.hint) from None
    return replace(fit, memory_bytes=memory_bytes, gpus=spread, most_bytes=most_bytes, on_gpu=gpus > 0)


def task_loader(cache: Path) -> Callable[[SweepSpec], Task]:
    """Loads the tasks of specs as `preflight` does that are there to be trained: on the CPU."""
    return lambda spec: load_task(spec, cache=cache, device=torch.device("cpu"))


# -- time --------------------------------------------------------------------------------------------------------------


def why_untimed(fit: Preflight, pack: int) -> str:
    """Why a pack's steps cannot be timed here; empty where they can."""
    if fit.too_large:
        return fit.too_large
    flops = 2 * pack * fit.step_flops
    if next(fit.task.model.parameters()).device.type == "cpu" and flops > _MOST_FLOPS:
        return f"two steps of a pack of {pack} take about {flops:.0e} FLOPs, too many to try on this machine's CPU"
    return ""


def seconds_per_member_step(spec: SweepSpec, reduction: Reduction, task: Task, pack: int) -> float:
    """Measures a full pack's step on this machine, one thread, and shares it out among its members, in seconds."""
    members = [_largest(spec, reduction)] * pack
    with one_thread(), bank_of(spec, task, members) as bank:
        optimizer = PackOptimizer(bank, optimizer_of(spec))
        stop = min(_WARM_STEPS + _TIMED_STEPS, spec.train.steps)
        ticks = [time.perf_counter()]
        for _ in steps_of(spec, task, optimizer, start=0, stop=stop):
            ticks.append(time.perf_counter())
            if len(ticks) > 2 and ticks[-1] - ticks[0] > _TIMED_S:
                break
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


def _step_flops(spec: SweepSpec, task: Task) -> int:
    targets = find_targets(task.model, spec.lora.target_modules, heads=heads_of_task(task))
    lookups = {name for name, target in targets.items() if target.kind == "embedding"}
    shapes = cost.layer_shapes(layer_widths(task.model, targets), set(targets), lookups)
    rows = task.most_rows(spec.train.batch_size) * spec.train.accumulation
    return cost.step_flops(shapes, members=1, rank=1, rows=rows).total


# -- memory ------------------------------------------------------------------------------------------------------------


def most_members(spec: SweepSpec, fit: Preflight, member: memory.MemberBytes | None) -> int | None:
    """The largest pack that a worker's memory holds, at least 1; None where that is not to be known from here.

    Args:
        spec: the spec.
        fit: what was found of it.
        member: see `member_bytes`.
    """
    targets = find_targets(fit.task.model, spec.lora.target_modules, heads=heads_of_task(fit.task))
    if not_packable(fit.task, targets):
        return 1
    if fit.memory_bytes is None or member is None:
        return None
    if fit.gpus > 1 and spec.compute.pack != "auto":
        return None  # a bound that is too low must not refuse what the user asks for
    # On a CPU workers keep what they free (`keep_freed_memory`), and with it the gaps between.
    reserve = _RESERVE if fit.on_gpu else _RESERVE_ON_CPU
    # Of several GPUs the one with most of the base counts, and each member as if all of it were there: no pack that
    # fits so can be too large, and one of up to so many times more members as there are GPUs may fit.
    share = fit.memory_bytes // fit.gpus
    return max(1, memory.pack_limit(share, base_bytes=fit.most_bytes, member=member, reserve=reserve))


def why_one_gpu(fit: Preflight) -> str:
    """Why workers of one GPU would do better than such of several; empty where they would not, or nobody knows."""
    if fit.gpus == 1 or fit.memory_bytes is None:
        return ""
    size, share = memory.base_bytes(fit.task.model), fit.memory_bytes // fit.gpus
    if size > _MOST_LOADED * share:
        return ""
    return (
        f"the base model takes {_gb(size)} and fits on one GPU of {_gb(share)} with room for members: GPUs that "
        "share a model compute in turn, so compute.gpus_per_worker: 1 would train packs on all of them at once"
    )


def member_bytes(spec: SweepSpec, reduction: Reduction, fit: Preflight) -> memory.MemberBytes | None:
    """What one more member takes, counted on the widest batch; None for a model that cannot be run without weights."""
    task = fit.outline
    indices, widest = _widest_batch(spec, task)
    try:
        with bank_of(spec, task, [_largest(spec, reduction)]) as bank:
            return memory.measure_member(
                bank,
                lambda: task.losses_K(indices, 1),
                optimizer_states=spec.train.law.states_with(spec.train.settings),
                most_rows=task.most_rows(spec.train.batch_size),
                widest=widest,
            )
    # What a model does that looks at values, such as which experts its tokens go to, fails in as many ways.
    except (RuntimeError, NotImplementedError):
        if next(task.model.parameters()).is_meta:
            return None
        raise


def _widest_batch(spec: SweepSpec, task: Task) -> tuple[Tensor, bool]:
    """Samples of a batch, and whether none brings more rows."""
    lengths_S = lengths_of(task)
    if lengths_S is None:
        return batch_indices(task.n_samples, spec.train.batch_size, 0, spec.train.seed), False
    return lengths_S.argsort(descending=True, stable=True)[: spec.train.batch_size].cpu(), True


def _largest(spec: SweepSpec, reduction: Reduction) -> Member:
    rank = max(reduction.space.ranks)
    head_lr = _TIMED_LR if reduction.space.trains_head else 0.0
    configuration = Configuration(rank, reduction.reference.at(rank), lr=_TIMED_LR, head_lr=head_lr)
    return Member(reduction.point(configuration), spec.train.seed)


def _memory_bytes(spec: SweepSpec, workers: int, device: torch.device) -> int:
    """A worker's share of what a device has, before anything is loaded."""
    if device.type == "cuda":
        share = spec.compute.gpus_per_worker
        if (gpus := gpus_of(spec, device)) > 1:
            return gpus * min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
        free, _ = torch.cuda.mem_get_info()
        return int(free * (1.0 if share == "auto" else min(1.0, share)))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // (workers + 1)  # one share is the driver's


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# -- workers -----------------------------------------------------------------------------------------------------------


def local_workers(spec: SweepSpec) -> int:
    """How many jobs this machine runs at once: one a GPU, or one a core where there is no GPU."""
    if spec.compute.workers != "auto":
        return spec.compute.workers
    gpus, share = torch.cuda.device_count(), spec.compute.gpus_per_worker
    if gpus and share != 0:
        return max(1, int(gpus / (1.0 if share == "auto" else share)))
    # Not on macOS, which has no affinities.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trains_on_gpu(spec: SweepSpec) -> bool:
    share = spec.compute.gpus_per_worker
    # A machine with fewer GPUs than a worker has none that a worker could be on.
    return torch.cuda.is_available() and share != 0 and (share == "auto" or torch.cuda.device_count() >= share)


def _asks_for_gpus(spec: SweepSpec) -> bool:
    return spec.compute.gpus_per_worker not in ("auto", 0)
