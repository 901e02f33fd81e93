"""A sweep's runs in MLflow: how they are found again, and made where they are missing. Takes a client; imports none."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sweeps.errors import TrackingError
from sweeps.projection import ARTIFACTS_DELIVERED, ARTIFACTS_TAG, NAME_TAG, ROLE_TAG, SWEEP_TAG, RunKey, RunWrite
from sweeps.tracking_address import artifact_location, deleted_experiment


@dataclass(slots=True)
class Run:
    """A run as MLflow has it."""

    id: str
    status: str
    parent: str | None


class Runs:
    """A sweep's runs in MLflow: found by their tags when it is opened, made where they are missing."""

    def __init__(self, client: Any, sweep: str, uri: str, experiment: str, *, prefer: frozenset[str]) -> None:
        """Opens the experiment and finds the runs.

        Args:
            client: an MLflow client.
            sweep: its id.
            uri: the tracking URI.
            experiment: the experiment's name.
            prefer: ids of runs that stay if a run should be there twice.
        """
        self._sweep = sweep
        self.client = client
        self.experiment_id = self._find_experiment(uri, experiment)
        self.owes_artifacts = False
        """Whether the parent, as it was found, says that it has not got all of the sweep's files."""
        self._runs: dict[RunKey, Run] = {}
        found = sorted(self._search(), key=lambda run: run.info.run_id not in prefer)
        for run in found:
            tags = run.data.tags
            key = RunKey(tags.get(ROLE_TAG, ""), tags.get(NAME_TAG, ""))
            if key in self._runs:
                # A request that timed out was carried out after all, after its run had been looked for and made again.
                self.client.delete_run(run.info.run_id)
            else:
                self._runs[key] = Run(run.info.run_id, run.info.status, tags.get("mlflow.parentRunId"))
                self.owes_artifacts |= tags.get(ARTIFACTS_TAG, ARTIFACTS_DELIVERED) != ARTIFACTS_DELIVERED

    def _find_experiment(self, uri: str, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            return str(self.client.create_experiment(name, artifact_location=artifact_location(uri, name)))
        if found.lifecycle_stage != "active":
            raise TrackingError(deleted_experiment(name, found.experiment_id))
        return str(found.experiment_id)

    def _search(self) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                filter_string=f"tags.`{SWEEP_TAG}` = '{self._sweep}'",
                max_results=1000,
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def has(self, entered: dict[RunKey, str]) -> bool:
        """Whether every run that the ledger knows of is still there."""
        return all(key in self._runs and self._runs[key].id == run for key, run in entered.items())

    def id_of(self, key: RunKey) -> str:
        """The id of a run that was found or made."""
        return self._runs[key].id

    def ensure(self, write: RunWrite) -> Run:
        """Makes the run that is written to, unless it is there."""
        if write.key not in self._runs:
            parent = None if write.key.role == "sweep" else self.id_of(RunKey("sweep"))
            made = self.client.create_run(
                self.experiment_id,
                start_time=write.start_ms,
                run_name=write.run_name,
                tags={
                    SWEEP_TAG: self._sweep,
                    ROLE_TAG: write.key.role,
                    NAME_TAG: write.key.name,
                    "mlflow.source.name": "lora-sweeps",
                    "mlflow.user": _user(),
                }
                | ({} if parent is None else {"mlflow.parentRunId": parent}),
            )
            self._runs[write.key] = Run(made.info.run_id, made.info.status, parent)
        return self._runs[write.key]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
