"""What is trained: a frozen model, data, and what they are measured by.

A task is built from its section of the spec by `load_task`. To add one: a model in the union of `sweeps/spec_tasks.py`,
a file here with a class that follows `Task`, and a line in `load_task`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sweeps.spec import SweepSpec
from sweeps.spec_tasks import CausalLmTask, DigitsTask, PythonTask, SequenceClassificationTask
from sweeps.tasks.protocol import Task

__all__ = ["Task", "load_task"]


def load_task(spec: SweepSpec, *, cache: Path, device: torch.device) -> Task:
    """Builds the task of a spec.

    Args:
        spec: the sweep's spec.
        cache: directory for what is costly to make and can be made again.
        device: where the model and the data are put.

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
        case SequenceClassificationTask() as section:
            from sweeps.tasks.sequence_classification import SequenceClassificationTask as Classification

            return Classification.load(section, cache=cache, device=device, dtype=dtype, seed=spec.train.seed)
        case PythonTask() as section:
            from sweeps.tasks.entrypoint import load_entrypoint

            return load_entrypoint(section, cache=cache, device=device, dtype=dtype)
