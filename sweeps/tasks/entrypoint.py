"""Tasks that a user's own Python function makes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from sweeps.errors import TaskError
from sweeps.spec_tasks import PythonTask
from sweeps.tasks.protocol import Task

_METHODS = ("model", "n_samples", "data", "most_rows", "losses_K", "evaluate")


def load_entrypoint(section: PythonTask, *, cache: Path, device: torch.device, dtype: torch.dtype) -> Task:
    """Calls the function and returns the task that it made.

    Raises:
        TaskError: there is no such function, or what it returns is no task. What it raises itself is let through.
    """
    module_name, _, name = section.entrypoint.partition(":")
    if section.path is not None and section.path not in sys.path:
        sys.path.insert(0, section.path)  # for good: what the module imports later may lie there too
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise  # it is there, and what it imports is not
        if section.path is None:
            raise TaskError("entrypoint", "a module that is installed", f"no module {error.name}") from None
        found = f"no module {error.name} there or installed"
        raise TaskError("entrypoint", f"a module in {section.path}", found, "set task.path to its directory") from None
    if not callable(factory := getattr(module, name, None)):
        raise TaskError("entrypoint", f"a function of {module_name}", f"no {name} in {module.__file__}")
    task: Task = factory(cache=cache, device=device, dtype=dtype, **section.options)
    if missing := [method for method in _METHODS if not hasattr(task, method)]:
        required = f"a function that returns a task, with {', '.join(_METHODS)}"
        raise TaskError("entrypoint", required, f"a {type(task).__name__} without {', '.join(missing)}")
    return task
