"""Brings what happened to MLflow, off the training path: the only file that imports mlflow, and only when it must.

    outbox      the ledger's events after the last `Delivered`; nothing else remembers what MLflow has yet to be told
    batch       some of these events, projected (`sweeps/projection.py`), written, and then entered as `Delivered`

A failure is treated as a crash: everything but the ledger is forgotten, the sweep's runs are found again by their tags,
and the batch is made again. MLflow can therefore be away for any time, and a driver can die between any two requests.
"""

from __future__ import annotations

import getpass
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sweeps.errors import TrackingError
from sweeps.events import Delivered, SweepCreated
from sweeps.ledger import Ledger, Record
from sweeps.projection import NAME_TAG, ROLE_TAG, SWEEP_TAG, Projection, RunKey, RunWrite
from sweeps.tracking_address import (
    absolute_uri,
    artifact_location,
    check_address,
    default_uri,
    deleted_experiment,
    hide_passwords,
    open_command,
    run_url,
    without_userinfo,
)

__all__ = [
    "MlflowWriter",
    "absolute_uri",
    "check_tracking",
    "default_uri",
    "deliver",
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
        self._outbox = _Outbox(ledger, sweep_id, uri, experiment)
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


def deliver(ledger: Ledger, sweep_id: str, uri: str | None = None, experiment: str | None = None) -> None:
    """Delivers what an earlier driver left in the outbox, in the foreground.

    Args:
        ledger: where the events are, and where `Delivered` goes.
        sweep_id: the sweep's id in it.
        uri: MLflow's tracking URI; None takes the one that the sweep was created with.
        experiment: the experiment's name; None likewise.

    Raises:
        TrackingError: MLflow cannot be reached or refuses; what was not delivered still waits in the ledger.
    """
    created = ledger.read(sweep_id)[0].event
    assert isinstance(created, SweepCreated), "a sweep's first event says that it was created"
    outbox = _Outbox(ledger, sweep_id, uri or created.tracking_uri, experiment or created.experiment)
    try:
        outbox.deliver()
    except Exception as error:
        raise TrackingError(_words(error)) from error
    if outbox.note is not None:
        raise TrackingError(outbox.note)


class _Outbox:
    """One sweep's way from the ledger to MLflow."""

    def __init__(self, ledger: Ledger, sweep: str, uri: str, experiment: str) -> None:
        self._ledger, self._sweep, self._uri, self._experiment = ledger, sweep, absolute_uri(uri), experiment
        self._runs: _Runs | None = None
        self._projection = Projection(sweep)
        self._seen = 0
        self._entered: dict[RunKey, str] = {}
        self.note: str | None = None
        """What MLflow refused for good without holding up the rest; None where there is nothing."""

    def deliver(self) -> None:
        """Brings MLflow up to the end of the ledger, or raises."""
        try:
            pending = self._open() if self._runs is None else self._ledger.read(self._sweep, after=self._seen)
            while pending:
                self._deliver_batch(pending[:_BATCH])
                pending = pending[_BATCH:] or self._ledger.read(self._sweep, after=self._seen)
        except BaseException:
            self._runs = None
            raise

    def _open(self) -> list[Record]:
        """Finds the sweep in MLflow and returns what it has yet to be told: everything, if a run has disappeared."""
        records = self._ledger.read(self._sweep)
        self._projection, self._entered, up_to = Projection(self._sweep), {}, 0
        for record in records:
            if isinstance(record.event, Delivered):
                up_to = record.event.up_to
                self._entered |= {RunKey("trial", str(n)): run for n, run in record.event.trial_run_ids.items()}
                self._entered[RunKey("sweep")] = record.event.parent_run_id
        self._runs = _Runs(self._sweep, self._uri, self._experiment, prefer=frozenset(self._entered.values()))
        if not self._runs.has(self._entered):
            self._entered, up_to = {}, 0
        self._projection.project(record for record in records if record.seq <= up_to)
        self._seen = up_to
        return [record for record in records if record.seq > up_to]

    def _deliver_batch(self, batch: list[Record]) -> None:
        assert self._runs is not None
        writes = self._projection.project(batch)
        for write in writes[-1:]:  # the parent, where it is among them: its children name it
            if write.key.role == "sweep":
                self._runs.ensure(write)
        for write in writes:
            self.note = self._runs.write(write) or self.note
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


@dataclass(slots=True)
class _Run:
    id: str
    status: str
    parent: str | None


class _Runs:
    """A sweep's runs in MLflow: found by their tags when it is opened, made where they are missing."""

    def __init__(self, sweep: str, uri: str, experiment: str, *, prefer: frozenset[str]) -> None:
        """Opens the experiment and finds the runs.

        Args:
            sweep: its id.
            uri: the tracking URI.
            experiment: the experiment's name.
            prefer: ids of runs that stay if a run should be there twice.
        """
        self._sweep = sweep
        self._client = _connect(uri)
        self.experiment_id = self._find_experiment(uri, experiment)
        self._runs: dict[RunKey, _Run] = {}
        found = sorted(self._search(), key=lambda run: run.info.run_id not in prefer)
        for run in found:
            tags = run.data.tags
            key = RunKey(tags.get(ROLE_TAG, ""), tags.get(NAME_TAG, ""))
            if key in self._runs:
                # A request that timed out was carried out after all, after its run had been looked for and made again.
                self._client.delete_run(run.info.run_id)
            else:
                self._runs[key] = _Run(run.info.run_id, run.info.status, tags.get("mlflow.parentRunId"))

    def _find_experiment(self, uri: str, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, artifact_location=artifact_location(uri, name)))
        if found.lifecycle_stage != "active":
            raise TrackingError(deleted_experiment(name, found.experiment_id))
        return str(found.experiment_id)

    def _search(self) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
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

    def ensure(self, write: RunWrite) -> _Run:
        """Makes the run that is written to, unless it is there."""
        if write.key not in self._runs:
            parent = None if write.key.role == "sweep" else self.id_of(RunKey("sweep"))
            made = self._client.create_run(
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
            self._runs[write.key] = _Run(made.info.run_id, made.info.status, parent)
        return self._runs[write.key]

    def write(self, write: RunWrite) -> str | None:
        """Writes to one run in as few requests as MLflow allows; returns what it refused for good, if anything."""
        from mlflow.entities import Metric, Param, RunTag

        run = self.ensure(write)
        if write.key.role != "sweep" and run.parent != self.id_of(RunKey("sweep")):
            run.parent = self.id_of(RunKey("sweep"))
            write.tags["mlflow.parentRunId"] = run.parent
        # The client cuts this into requests of the size that MLflow takes.
        self._client.log_batch(
            run.id,
            metrics=[Metric(point.key, point.value, point.timestamp_ms, point.step) for point in write.metrics],
            params=[Param(key, value) for key, value in write.params.items()],
            tags=[RunTag(key, value) for key, value in write.tags.items()],
        )
        if write.status is not None and write.status != run.status:
            if write.status == "RUNNING":
                self._client.update_run(run.id, status="RUNNING")
            else:
                self._client.set_terminated(run.id, status=write.status, end_time=write.end_ms)
            run.status = write.status
        return self._write_artifacts(run.id, write)

    def _write_artifacts(self, run: str, write: RunWrite) -> str | None:
        try:
            if write.texts:
                with tempfile.TemporaryDirectory(prefix="lora-sweeps-") as directory:
                    for name, text in write.texts.items():
                        (Path(directory) / name).write_text(text, encoding="utf-8")
                    self._client.log_artifacts(run, directory)
            for directory in write.directories:
                self._client.log_artifacts(run, directory, artifact_path="report")
        except Exception as error:
            # An artifact store that refuses must not hold up the metrics; one that is away comes back.
            if _is_transient(error):
                raise
            note = (
                f"MLflow has no artifacts: its artifact store must be writable from here, and refused: {_words(error)}"
            )
            self._client.set_tag(run, "lora_sweeps.artifacts", note[:4900])
            return note
        return None


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
    return isinstance(error, (OSError, sa.exc.DBAPIError))


def _words(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return hide_passwords(text.splitlines()[0])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


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
            f"tracking.uri must name an MLflow server that lets us in; {without_userinfo(uri)} refuses ({found}): "
            f"{_words(error)}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; if "
            "it has no login, start it with --allowed-hosts naming the host in this address"
        ) from error
    if known is not None and known.lifecycle_stage != "active":
        raise TrackingError(deleted_experiment(experiment, known.experiment_id))
