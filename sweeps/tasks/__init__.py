"""What is trained: a frozen model, data, and what they are measured by.

A task is built from its section of the spec by `load_task`. To add one: a model in the union of `sweeps/spec_tasks.py`,
a file here with a class that follows `Task`, and a line in `load_task`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sweeps.spec import SweepSpec
from sweeps.spec_tasks import CausalLmTask, DigitsTask, PythonTask
from sweeps.tasks.protocol import Task

__all__ = ["Task", "base_bytes", "load_task"]


def base_bytes(spec: SweepSpec) -> int | None:
    """Bytes of a task's base model before it is loaded; None where that is not to be known, and no meta device either.

    Raises:
        TaskError: there is no such model.
    """
    match spec.task:
        case CausalLmTask() as section:
            from sweeps.tasks import pretrained

            return pretrained.base_bytes(section, getattr(torch, spec.train.dtype))
    return None


def load_task(spec: SweepSpec, *, cache: Path, device: torch.device) -> Task:
    """Builds the task of a spec.

    Args:
        spec: the sweep's spec.
        cache: directory for what is costly to make and can be made again.
        device: where the model and the data are put. On `meta` a task that `base_bytes` knows has its model's structure
            and no weights: enough to look at the model, and to count memory.

    Raises:
        TaskError: the model or the data do not have what the spec asks for.
    """
    dtype: torch.dtype = getattr(torch, spec.train.dtype)
    match spec.task:
        case DigitsTask(base_seed=seed):
            from sweeps.tasks.digits import DigitsTask as Digits

            return Digits.load(seed, cache=cache, device=device, dtype=dtype)
        case CausalLmTask() as section:
            from sweeps.tasks.causal_lm import CausalLmTask as CausalLm

            return CausalLm.load(section, cache=cache, device=device, dtype=dtype)
        case PythonTask() as section:
            from sweeps.tasks.entrypoint import load_entrypoint

            return load_entrypoint(section, cache=cache, device=device, dtype=dtype)
