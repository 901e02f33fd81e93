"""Brings what happened to MLflow, off the training path: the only file that imports mlflow, and only when it must.

    outbox      the ledger's events after the last `Delivered`; nothing else remembers what MLflow has yet to be told
    batch       some of these events, projected (`sweeps/projection.py`), written, and then entered as `Delivered`
    artifacts   the sweep's files, after the events; that they are owed is a tag of the parent run (`ARTIFACTS_TAG`)

A failure is treated as a crash: everything but the ledger is forgotten, the sweep's runs are found again by their tags,
and the batch is made again. MLflow can therefore be away for any time, and a driver can die between any two requests.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sweeps.errors import LedgerAwayError, TrackingError
from sweeps.events import Delivered, Record
from sweeps.ledger import Ledger
from sweeps.projection import ARTIFACTS_DELIVERED, ARTIFACTS_TAG, Projection, RunKey, RunWrite
from sweeps.secrecy import hide_passwords
from sweeps.tracking_address import (
    absolute_uri,
    check_address,
    check_artifact_location,
    default_uri,
    deleted_experiment,
    open_command,
    run_url,
    shown_address,
)
from sweeps.tracking_fields import tag
from sweeps.tracking_runs import Runs

__all__ = [
    "MlflowWriter",
    "Outbox",
    "absolute_uri",
    "check_tracking",
    "default_uri",
    "hide_passwords",
    "open_command",
    "run_url",
]

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # By default the client retries for 246 s inside one call; the writer retries from the ledger instead.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}

_PERIOD_S = 1.0
"""Between deliveries; events that come within this time share requests."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
"""Between attempts to reach MLflow."""

_BATCH = 500
"""Events to a batch: how much is written again when a delivery is cut short."""


class MlflowWriter:
    """Delivers a sweep's events to MLflow from a thread of its own. Nobody waits for it but `finish`."""

    def __init__(self, ledger: Ledger, sweep_id: str, uri: str, experiment: str) -> None:
        """Prepares a writer; nothing is opened before `start`.

        Args:
            ledger: where the events are, and where `Delivered` goes.
            sweep_id: the sweep's id in it.
            uri: MLflow's tracking URI.
            experiment: name of the experiment; made where it is missing.
        """
        self._outbox = Outbox(ledger, sweep_id, uri, experiment)
        self._woken = threading.Event()
        self._finishing = threading.Event()
        self._abandoned = False
        self._all_delivered = False
        self._thread: threading.Thread | None = None
        self.last_error: str | None = None
        """Why the latest attempt failed, or what MLflow could not be given; None where nothing is wrong."""

    def start(self) -> None:
        """Starts the thread; what an earlier driver left in the outbox goes first."""
        self._woken.set()
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Says that events were appended. Never blocks."""
        self._woken.set()

    def finish(self, timeout_s: float) -> bool:
        """Delivers everything that is in the ledger and stops the thread.

        Returns:
            Whether MLflow has everything; where it has not, `last_error` says why, and the rest waits in the ledger.
        """
        if self._thread is None:
            self.start()
        assert self._thread is not None
        self._finishing.set()
        self._woken.set()
        self._thread.join(timeout_s)
        self._abandoned = self._thread.is_alive()
        if self._abandoned and self.last_error is None:
            self.last_error = f"MLflow did not take everything within {timeout_s:g} s"
        return self._all_delivered

    def _run(self) -> None:
        delay_s, refusal = _FIRST_DELAY_S, None
        while not self._abandoned:
            self._woken.wait()
            self._woken.clear()  # first, so that a wake from here on is not lost
            finishing = self._finishing.is_set()
            try:
                self._outbox.deliver()
            # Whatever it is, the sweep goes on and the ledger keeps what was not delivered.
            except Exception as error:
                self.last_error = _words(error)
                if finishing and refusal == self.last_error and not _is_transient(error):
                    return
                refusal = self.last_error
                self._woken.set()
                if finishing:
                    time.sleep(_FIRST_DELAY_S)
                else:
                    self._finishing.wait(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            else:
                delay_s, refusal = _FIRST_DELAY_S, None
                self.last_error = self._outbox.note
                if finishing:
                    self._all_delivered = self._outbox.note is None
                    return
                self._finishing.wait(_PERIOD_S)


class Outbox:
    """One sweep's way from the ledger to MLflow."""

    def __init__(self, ledger: Ledger, sweep: str, uri: str, experiment: str) -> None:
        self._ledger, self._sweep, self._uri, self._experiment = ledger, sweep, absolute_uri(uri), experiment
        self._runs: Runs | None = None
        self._projection = Projection(sweep)
        self._seen = 0
        self._entered: dict[RunKey, str] = {}
        self._owed: dict[str, str | Path] = {}
        self.note: str | None = None
        """Why MLflow has not got the sweep's files, where its store refuses them; None where nothing is wrong."""

    def deliver(self) -> None:
        """Brings MLflow up to the end of the ledger, or raises."""
        try:
            if self._runs is None:
                self._open()
            while batch := self._ledger.read(self._sweep, after=self._seen, limit=_BATCH):
                self._deliver_batch(batch)
            if self._owed and self.note is None:
                self._deliver_artifacts()  # last: metrics never wait for files
        except BaseException:
            self._runs = None
            raise

    def _open(self) -> None:
        """Finds the sweep in MLflow, and how far it has been told: of nothing, if a run has disappeared."""
        self._projection, self._entered, up_to = Projection(self._sweep), {}, 0
        for record in self._ledger.stream(self._sweep):
            if isinstance(record.event, Delivered):
                up_to = record.event.up_to
                self._entered |= {RunKey("trial", str(n)): run for n, run in record.event.trial_run_ids.items()}
                self._entered[RunKey("sweep")] = record.event.parent_run_id
        self._runs = Runs(
            _connect(self._uri), self._sweep, self._uri, self._experiment, prefer=frozenset(self._entered.values())
        )
        if not self._runs.has(self._entered):
            self._entered, up_to = {}, 0
        self._owed, self.note = {}, None
        for told in _batches(self._ledger.stream(self._sweep), up_to):
            for write in self._projection.project(told):
                if self._runs.owes_artifacts:
                    self._owed |= write.artifacts
        self._seen = up_to

    def _deliver_batch(self, batch: list[Record]) -> None:
        assert self._runs is not None
        writes = self._projection.project(batch)
        for write in writes[-1:]:  # the parent, where it is among them: its children name it
            if write.key.role == "sweep":
                self._runs.ensure(write)
        for write in writes:
            self._write(write)
            if write.artifacts:  # what was refused before has another try with them
                self._owed |= write.artifacts
                self.note = None
        self._seen = batch[-1].seq
        if all(isinstance(record.event, Delivered) for record in batch):
            return
        ids = {write.key: self._runs.id_of(write.key) for write in writes if write.key.role != "twin"}
        new = {int(key.name): run for key, run in ids.items() if key.role == "trial" and self._entered.get(key) != run}
        delivered = Delivered(
            up_to=self._seen,
            experiment_id=self._runs.experiment_id,
            parent_run_id=self._runs.id_of(RunKey("sweep")),
            trial_run_ids=new,
        )
        self._ledger.append(self._sweep, [delivered])
        self._entered |= ids

    def _write(self, write: RunWrite) -> None:
        """Writes to one run in as few requests as MLflow allows."""
        from mlflow.entities import Metric, Param, RunTag

        assert self._runs is not None
        client, run = self._runs.client, self._runs.ensure(write)
        if write.key.role != "sweep" and run.parent != self._runs.id_of(RunKey("sweep")):
            run.parent = self._runs.id_of(RunKey("sweep"))
            write.tags["mlflow.parentRunId"] = run.parent
        # The client cuts this into requests of the size that MLflow takes.
        client.log_batch(
            run.id,
            metrics=[Metric(point.key, point.value, point.timestamp_ms, point.step) for point in write.metrics],
            params=[Param(key, value) for key, value in write.params.items()],
            tags=[RunTag(key, value) for key, value in write.tags.items()],
        )
        if write.status is not None and write.status != run.status:
            if write.status == "RUNNING":
                client.update_run(run.id, status="RUNNING")
            else:
                client.set_terminated(run.id, status=write.status, end_time=write.end_ms)
            run.status = write.status

    def _deliver_artifacts(self) -> None:
        """Gives the parent the files that it has not got.

        A store that is away raises and is tried again. One that refuses leaves `note`, and the parent's tag, by which a
        resume finds that files are owed.
        """
        assert self._runs is not None
        client, parent = self._runs.client, self._runs.id_of(RunKey("sweep"))
        try:
            with tempfile.TemporaryDirectory(prefix="lora-sweeps-") as directory:
                for path, artifact in self._owed.items():
                    if isinstance(artifact, str):
                        (Path(directory) / path).write_text(artifact, encoding="utf-8")
                client.log_artifacts(parent, directory)
            for path, artifact in self._owed.items():
                if isinstance(artifact, Path):
                    client.log_artifacts(parent, str(artifact), artifact_path=path)
        except Exception as error:
            if _is_transient(error):
                raise
            self.note = (
                f"MLflow has no artifacts: its artifact store must be writable from here, and refused: {_words(error)}"
            )
            client.set_tag(parent, ARTIFACTS_TAG, tag(self.note))
        else:
            client.set_tag(parent, ARTIFACTS_TAG, ARTIFACTS_DELIVERED)
            self._owed = {}


def _batches(records: Iterable[Record], up_to: int) -> Iterator[list[Record]]:
    """The records up to a number, some at a time: what is made of them all at once would fill the memory."""
    told = takewhile(lambda record: record.seq <= up_to, records)
    while batch := list(islice(told, _BATCH)):
        yield batch


def _connect(uri: str) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _is_transient(error: Exception) -> bool:
    """Whether trying again can help: what is away, busy or failing; not what refuses, and not a fault of ours."""
    status = getattr(error, "get_http_status_code", None)
    if status is not None:
        return status() >= 500 or status() in (404, 408, 429)
    if isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError)):
        return False
    # boto3, with which MLflow writes to an S3, has exceptions of its own for a way that is cut.
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    cut = kinds & {"botocore.exceptions.ConnectionError", "botocore.exceptions.HTTPClientError"}
    return bool(cut) or isinstance(error, (OSError, sa.exc.DBAPIError, LedgerAwayError))


def _words(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return hide_passwords(text.splitlines()[0])


def check_tracking(uri: str, experiment: str | None = None) -> None:
    """Finds out within seconds, and without leaving a trace, whether a tracking URI can be used.

    Args:
        uri: MLflow's tracking URI.
        experiment: the experiment to be written; None where it is not known yet.

    Raises:
        TrackingError: it cannot, as far as can be seen without writing.
    """
    check_address(uri, experiment, ask_client=_ask_client)


def _ask_client(uri: str, experiment: str, found: str) -> None:
    """Asks as the writer will ask: with MLflow's own client, which knows where its credentials are."""
    try:
        client = _connect(uri)
        known = client.get_experiment_by_name(experiment)
    except Exception as error:
        raise TrackingError(
            f"tracking.uri must name an MLflow server that lets us in; {shown_address(uri)} refuses ({found}): "
            f"{_words(error)}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; if "
            "it has no login, start it with --allowed-hosts naming the host in this address"
        ) from error
    if known is not None and known.lifecycle_stage != "active":
        raise TrackingError(deleted_experiment(experiment, known.experiment_id))
    if known is not None:
        check_artifact_location(known.artifact_location)


def artifact_store(uri: str, experiment: str) -> Any | None:
    """Where a server's artifacts go, as MLflow's client writes there: of an experiment, else of the first.

    Returns:
        MLflow's `ArtifactRepository`; None where there is no experiment yet to tell.
    """
    client = _connect(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            found = client.get_experiment("0")
        except MlflowException:
            return None
    return get_artifact_repository(found.artifact_location, tracking_uri=uri)
