"""A worker as Ray Tune sees it."""

from __future__ import annotations

from typing import Any

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
