"""torch.compile for the frozen model of a task.

Adapters stay as they are: they add gradients into a bank's storage on the way back (`lora_core/layer.py`), and a bank's
layers are new in every job. So each adapted layer is a break between two compiled graphs, and graphs are used again for
packs of other sizes.
"""

from __future__ import annotations

import torch

from sweeps.errors import TaskError
from sweeps.tasks.protocol import Task


def compile_model(task: Task) -> None:
    """Has a task's model compiled when it is run for the first time, for batches of any size."""
    task.model.compile(dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Compiles something small.

    Raises:
        TaskError: nothing can be compiled here.
    """
    try:
        torch.compile(lambda x: torch.tanh(x) + 1)(torch.ones(8, device=device))
    # No compiler, no headers, no Triton: each part of torch's has errors of its own.
    except Exception as error:
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        way_out = "install one, such as g++, or set it to false"
        raise TaskError("torch_compile", "a compiler that torch can use", found, way_out) from None
