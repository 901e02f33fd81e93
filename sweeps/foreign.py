"""Optimizers that the table of laws does not have: loads one by name, and looks for its law on a spec's own task."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.adapter import Member
from lora_core.discovery import Discovery, find_law
from lora_core.foreign import ForeignOptimizer
from lora_core.gauge import FactorSettings, Point, scaling_of
from lora_core.optimizers import PackOptimizer
from lora_core.trajectory import Trajectory, record_trajectories
from sweeps.errors import InputError
from sweeps.recipe import bank_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.tasks import Task


def load_optimizer(name: str) -> ForeignOptimizer:
    """Imports an optimizer by the name `package.module:Class`, also from the working directory. This runs its code.

    Raises:
        InputError: there is no such module or class, or it is no optimizer that can be made from lr alone.
    """
    required = "--optimizer must be package.module:Class, a torch.optim.Optimizer"
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{required}; found {name!r}; such as torch.optim:AdamW")
    try:
        found: Any = _import(module_name)
    except Exception as error:  # whatever the user's module raises when it is run
        found = f"a module that cannot be imported ({type(error).__name__}: {error})"
        raise InputError(f"{required}; found {found}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{required}; found no {part!r} in {getattr(found, '__name__', module_name)}")
        found = getattr(found, part)
    try:
        return ForeignOptimizer(found)
    except ValueError as error:
        raise InputError(f"{required}; {error}") from None


def find_law_of(
    kind: ForeignOptimizer,
    spec: SweepSpec,
    task: Task,
    configuration: Configuration,
    *,
    steps: int,
    progress: Callable[[int, str], None],
) -> Discovery:
    """Looks for the law of an optimizer, training a configuration of the spec on the spec's task with it.

    Raises:
        InputError: the optimizer does not take the configuration.
    """
    scaling = scaling_of(configuration.alpha, configuration.rank, rslora=spec.lora.rslora)
    settings = FactorSettings(configuration.lr)
    b = replace(settings, lr=configuration.lr * configuration.lr_ratio)
    point = Point(
        configuration.rank,
        scaling,
        configuration.init_scale,
        settings,
        b,
        clip_norm=spec.train.clip_norm,
        dropout=spec.lora.dropout,
        head=FactorSettings(configuration.head_lr) if configuration.head_lr else None,
    )

    def run(point: Point, steps: int) -> Trajectory:
        lone = Member(point, spec.train.seed)
        with bank_of(spec, task, [lone]) as bank:
            return record_trajectories(bank, steps_of(spec, task, PackOptimizer(bank, kind), start=0, stop=steps))[0]

    try:
        return find_law(run, point, kind, steps=steps, progress=progress)
    except ValueError as error:
        raise InputError(f"--optimizer must be one that can train {configuration.label()}; found: {error}") from None


def middle_of(reduction: Reduction) -> Configuration:
    """A configuration in the middle of the space, at the reference alpha."""
    space = reduction.space
    rank = space.ranks[(len(space.ranks) - 1) // 2]
    middles = {name: reduction.middle(name) for name in ("lr", "init_scale", "lr_ratio", "head_lr")}
    return Configuration(rank, reduction.reference.at(rank), **middles)


def _import(name: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)
