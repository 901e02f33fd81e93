"""What of a spec its model and its data cannot serve: found before anything is trained, every fault with its key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from lora_core.adapter import Member
from lora_core.base import BaseLayer
from lora_core.gauge import Point
from lora_core.heads import find_heads
from lora_core.packable import NotPackableError, check_members, check_own_weights, check_packable
from lora_core.targets import NoTargetError, find_targets
from sweeps.errors import Fault, SpecError
from sweeps.recipe import bank_of, heads_of_task
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.spec_parameters import Choice
from sweeps.spec_tasks import ModelTask
from sweeps.tasks import Task


def targets_of(document: SpecDocument, reduction: Reduction, task: Task) -> dict[str, BaseLayer]:
    """Returns the layers that a spec's adapters go on, after holding the spec against them.

    Raises:
        SpecError: everything that the model or the data cannot serve.
    """
    _check_head(document, reduction, task)
    try:
        targets = find_targets(task.model, document.spec.lora.target_modules, heads=heads_of_task(task))
    except NoTargetError as error:
        required = "names of linear layers of the model"
        raise document.error("lora.target_modules", required, _targets(document.spec), str(error)) from None
    faults = [*_sizes(document, reduction, task, targets), *_adapters(document, reduction, task, targets)]
    if faults:
        raise SpecError(document.source, tuple(faults))
    if reduction.space.trains_head and not next(task.model.parameters()).is_meta:
        _try_head(document, reduction, task, members=1 if not_packable(task, targets) else 2)
    return targets


def _check_head(document: SpecDocument, reduction: Reduction, task: Task) -> None:
    """Checks that a head has a learning rate, and that a learning rate has a head."""
    wanted, said = reduction.space.trains_head, getattr(task, "heads", ())
    if said and not wanted:
        required = f"a learning rate for {', '.join(said)}, which this task trains whole"
        raise document.error("parameters.head_lr", required, "none", "such as {min: 1e-4, max: 1e-2}")
    if wanted:
        try:
            find_heads(task.model, heads_of_task(task))
        except ValueError as error:
            hint = "or leave head_lr out"
            raise document.error("parameters.head_lr", "a task with a head", str(error), hint) from None


def _try_head(document: SpecDocument, reduction: Reduction, task: Task, *, members: int) -> None:
    """Runs two samples with a head for each member: what a module does with its rows is not to be seen in it."""
    spec, samples = document.spec, torch.arange(min(2, task.n_samples))
    point = reduction.point(Configuration(1, reduction.reference.at(1), lr=1e-6, head_lr=1e-6))

    def run(point: Point) -> None:
        with bank_of(spec, task, [Member(point, 0)] * members):
            task.losses_K(samples, members).sum().backward()  # type: ignore[no-untyped-call]

    run(replace(point, head=None))  # whatever is wrong without a head is no fault of the head
    try:
        run(point)
    # A module of any kind may be named, and each has its own way not to be one function of a member's rows.
    except Exception as error:
        path = "task.head" if isinstance(spec.task, ModelTask) else "parameters.head_lr"
        heads = ", ".join(find_heads(task.model, heads_of_task(task)))
        required = "modules that make one tensor of one tensor, row by row, to be trained whole"
        found = f"{heads}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise document.error(path, required, found, "name others, or leave it out") from None


def _sizes(
    document: SpecDocument, reduction: Reduction, task: Task, targets: Mapping[str, BaseLayer]
) -> Iterator[Fault]:
    widths = {name: min(layer.in_features, layer.out_features) for name, layer in targets.items()}
    narrowest = min(widths, key=lambda name: widths[name])
    if (rank := max(reduction.space.ranks)) > widths[narrowest]:
        required = f"ranks of at most {widths[narrowest]}, the width of {narrowest}"
        yield document.fault("parameters.rank", required, str(rank))
    if (batch := document.spec.train.batch_size) > task.n_samples:
        yield document.fault(
            "train.batch_size", f"at most {task.n_samples}, the number of training samples", str(batch)
        )


def _adapters(
    document: SpecDocument, reduction: Reduction, task: Task, targets: Mapping[str, BaseLayer]
) -> Iterator[Fault]:
    spec = document.spec
    try:
        check_own_weights(task.model, dict(targets))
    except ValueError as error:
        required = "layers whose weights and names are their own"
        yield document.fault("lora.target_modules", required, _targets(spec), str(error))
    point = reduction.point(Configuration(1, reduction.reference.at(1), lr=1.0))
    for ratio in _ends(spec.parameters.lr_ratio):
        b = replace(point.b, lr=point.b.lr * ratio)
        try:
            check_members([Member(replace(point, b=b, magnitude=None), 0)], targets)
        except ValueError as error:
            yield document.fault("parameters.lr_ratio", "1, for these target layers", f"{ratio:g}", str(error))
            break
    if spec.lora.dora:
        try:
            check_members([Member(point, 0)], targets)
        except ValueError as error:
            yield document.fault("lora.dora", "false, for these target layers", "true", str(error))
    if isinstance(pack := spec.compute.pack, int) and pack > 1 and (reason := not_packable(task, targets)):
        yield document.fault("compute.pack", "1 or auto, for this model", str(pack), reason)


def not_packable(task: Task, targets: Mapping[str, BaseLayer]) -> str:
    """Why several members cannot be trained over a task's model at once; empty where they can."""
    try:
        check_packable(task.model, targets.keys())
    except NotPackableError as error:
        return str(error)
    return ""


def _ends(dimension: object) -> tuple[float, float]:
    if isinstance(dimension, Choice):
        return min(dimension.values), max(dimension.values)
    return dimension.min, dimension.max  # type: ignore[attr-defined]


def _targets(spec: SweepSpec) -> str:
    targets = spec.lora.target_modules
    return repr(targets) if isinstance(targets, str) else ", ".join(targets)
