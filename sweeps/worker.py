"""A worker as Ray Tune sees it."""

from __future__ import annotations

import os
from typing import Any

import torch
from ray import tune
from ray.util import get_node_ip_address

from lora_core.allocator import keep_freed_memory
from sweeps.jobs import JobOrder
from sweeps.training import JobRunner


class PackTrainable(tune.Trainable):  # type: ignore[misc]
    """Ray's view of a worker: one Ray Tune trial is one job, and the actor goes on to the next."""

    def setup(self, config: dict[str, Any]) -> None:
        """Prepares the actor for its first job."""
        keep_freed_memory()  # the process is Ray's, and trains packs only
        keep_to_share(config["gpus"])
        self._runner = JobRunner()
        self._order = config["order"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next job."""
        self._order = new_config["order"]
        return True

    def step(self) -> dict[str, Any]:
        """Does the whole job."""
        result = self._runner.run(JobOrder.model_validate_json(self._order))
        result = result.model_copy(update={"node": get_node_ip_address()})
        return {"result": result.model_dump_json(), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: members' states are saved by the job itself."""


def keep_to_share(gpus: float) -> None:
    """Keeps this process to the GPUs that Ray gave it, before it has used any.

    Args:
        gpus: how many, or what share of one. Ray leaves all GPUs of a node visible to whoever asks for none, and gives
            the whole memory of a GPU to each of those that share it.
    """
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus)
