"""Drives a sweep from its spec to its report: starts it or takes it up again, and ends it in order however it ends."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sweeps import engine, nodes, storage, tracking
from sweeps.clock import Clock
from sweeps.deliverables import write_report
from sweeps.dtypes import with_dtype
from sweeps.errors import ClusterError, StateError, TrackingError
from sweeps.events import (
    DriverStarted,
    Event,
    JobEnded,
    JobStarted,
    ReportWritten,
    SweepCreated,
    SweepEnded,
    SweepState,
    without_losses,
)
from sweeps.home import Home, new_id
from sweeps.interrupts import Interrupted, Interrupts
from sweeps.jobs import JobOrder, JobResult
from sweeps.ledger import Ledger
from sweeps.patience import PatientLedger
from sweeps.plan import Plan, extended, trial_space
from sweeps.planning import Elsewhere, plan_for_cluster, plan_sweep
from sweeps.records import SweepRecord, read_sweep
from sweeps.reduction import Reduction
from sweeps.search import PackSearcher
from sweeps.secrecy import MASK, hide_passwords
from sweeps.spec import SpecDocument, SweepSpec

_DELIVER_S = 60
"""How long the end of a sweep waits for MLflow; what is not delivered by then stays in the ledger."""

_DELIVER_INTERRUPTED_S = 5
"""The same after Ctrl-C, where somebody waits at the terminal."""


class Progress(Protocol):
    """Who wants to know how a sweep is getting on."""

    def stage(self, text: str) -> None:
        """The sweep entered a new stage."""

    def events(self, sweep: str, events: list[Event]) -> None:
        """These were entered in the ledger."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sweep came out of a driver.

    Attributes:
        record: all that the ledger knows of it now.
        report: directory of the report; None where it could not be written before the end.
        delivered: whether MLflow has everything.
        undelivered_reason: why not.
        signal: the signal that interrupted it; None where none did.
        seconds: where this driver's wall time went, by stage.
    """

    record: SweepRecord
    report: Path | None
    delivered: bool
    undelivered_reason: str | None
    signal: int | None
    seconds: dict[str, float]


def start(
    document: SpecDocument,
    home: Home,
    *,
    name: str | None,
    address: str | None,
    progress: Progress,
    interrupts: Interrupts,
    sweep: str | None = None,
) -> Outcome:
    """Runs a spec as a new sweep, to its end or to an interruption.

    Nothing is entered anywhere before the spec, the tracking server, the state directory and the cluster have all been
    found usable.

    Args:
        document: the spec.
        home: the state directory.
        name: in place of the spec's own name.
        address: of a running Ray cluster; None starts one on this machine.
        progress: is told how it gets on.
        interrupts: raises `Interrupted` before there is a sweep; after that, a signal ends the sweep in order.
        sweep: the id of the new sweep, from `new_id`; None for one of its own.

    Raises:
        InputError: something that was asked for cannot be done.
    """
    clock = Clock()
    progress.stage("checking the spec against the model and the data")
    document = with_dtype(document)
    spec = document.spec
    # A cluster's workers are none of this machine, and are planned for once it is there.
    plan = plan_sweep(document, home, place=None if address is None else Elsewhere(None, 0.0))
    uri = spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(Path.cwd())
    experiment = spec.tracking.experiment or spec.name
    tracking.check_tracking(uri, experiment)
    with (
        home.ledger() as ledger,
        closing_killed(home, ledger),
        _cluster(home, address, plan.workers, progress, interrupts),
    ):
        checkpoints, found = storage.configured_place() or "", nodes.look()
        resources = _resources(found, spec, checkpoints or str(home.path))
        if address is not None:
            plan = plan_for_cluster(found, resources, document, home, trials=plan.trials)
        sweep = sweep or new_id(name or spec.name)
        created = SweepCreated(
            name=name or spec.name,
            spec=spec.model_dump(mode="json"),
            spec_text=hide_passwords(document.text),
            source=document.source,
            plan=plan.model_dump(mode="json"),
            tracking_uri=hide_passwords(tracking.absolute_uri(uri)),
            experiment=experiment,
            lanes=plan.workers + 1,
            pack=plan.pack,
            checkpoints=checkpoints,
        )
        with home.driving(sweep):
            ledger.create(sweep, created)
            return _Driver(home, ledger, sweep, uri, clock, progress, interrupts).drive(resources, resumed=False)


def resume(
    reference: str,
    home: Home,
    *,
    address: str | None,
    progress: Progress,
    interrupts: Interrupts,
    trials: int | None = None,
    attended: bool = True,
) -> Outcome:
    """Takes a sweep up where the ledger left off, however its last driver ended, or if it never had one.

    Args:
        reference: the sweep's id, its name, or `last`.
        home: the state directory.
        address: of a running Ray cluster; None starts one on this machine.
        progress: is told how it gets on.
        interrupts: raises `Interrupted` before there is a sweep; after that, a signal ends the sweep in order.
        trials: how many it is to train in all from now on; None for as many as it has. The number that an unfinished
            sweep was given last may be given again: whoever was interrupted repeats the same command.
        attended: whether somebody waits, who is told at once that MLflow is away, and whose other sweeps are looked
            after. Otherwise what MLflow is not told waits in the ledger, and others are a service's to look after.

    Raises:
        InputError: there is no such sweep, it cannot be driven from here, or not be given so many trials.
    """
    clock = Clock()
    with home.ledger() as ledger:
        sweep = ledger.find(reference).id
        with home.driving(sweep):
            record = read_sweep(ledger, sweep)
            if trials == record.extended_to and record.state != "finished":
                trials = None
            if trials is not None:
                extended(record.plan, record.spec, trials)
            uri = _tracking_uri(record)
            if attended:
                tracking.check_tracking(uri, record.created.experiment)
            driver = _Driver(home, ledger, sweep, uri, clock, progress, interrupts)
            with closing_killed(home, ledger, spare=sweep) if attended else contextlib.nullcontext():
                if record.state == "finished" and trials is None:
                    with interrupts.held():
                        return driver.conclude()
                with _cluster(home, address, record.plan.workers, progress, interrupts):
                    checkpoints = record.created.checkpoints or str(home.path)
                    resources = _resources(nodes.look(), record.spec, checkpoints)
                    return driver.drive(resources, resumed=record.driven, trials=trials)


def _resources(found: nodes.Cluster, spec: SweepSpec, checkpoints: str) -> nodes.Resources:
    """What a worker takes of the connected cluster, which must have it, and see the checkpoints from all its nodes."""
    resources = found.resources(spec.compute.gpus_per_worker)
    found.check_fits(resources)
    nodes.check_storage(checkpoints)
    return resources


class _Driver:
    """Drives one sweep, once, on the connected cluster."""

    def __init__(
        self,
        home: Home,
        ledger: Ledger,
        sweep: str,
        uri: str,
        clock: Clock,
        progress: Progress,
        interrupts: Interrupts,
    ) -> None:
        self._home, self._sweep = home, sweep
        # The writer has patience of its own, in its own thread.
        self._ledger = PatientLedger(ledger, say=progress.stage, hurried=lambda: interrupts.signal is not None)
        self._clock, self._progress, self._interrupts = clock, progress, interrupts
        self._training_began = self._certifying = False
        created = read_sweep(self._ledger, sweep).created
        self._workers = Plan.model_validate(created.plan).workers
        self._writer = tracking.MlflowWriter(ledger, sweep, uri, created.experiment)

    def drive(self, resources: nodes.Resources, *, resumed: bool, trials: int | None = None) -> Outcome:
        """Runs the sweep to its end or to an interruption, and leaves everything in order. Called with signals held.

        Args:
            resources: what a worker takes.
            resumed: whether it had a driver before.
            trials: how many it is given in all; None for as many as it has.
        """
        searcher, past = self._searcher(), [without_losses(each) for each in self._ledger.stream(self._sweep)]
        searcher.replay(past)
        self._progress.events(self._sweep, [record.event for record in past])
        extension = [] if trials is None else searcher.extend(trials)
        # At once: a driver that is killed has given the sweep its trials and is resumed, or has done neither.
        self._append([*extension, DriverStarted(resumed=resumed, place=_place(self._home))])
        self._writer.start()
        return self.conclude(self._run(searcher, resources))

    def conclude(self, failure: Exception | None = None) -> Outcome:
        """Writes the report and gives MLflow what it has not got yet, whatever went wrong before; then raises that."""
        report_directory = None
        try:
            report_directory = self._write_report()
        except Exception as error:
            failure = failure or error
        self._progress.stage("delivering to MLflow")
        delivered = self._deliver()
        if failure is not None:
            raise failure
        return Outcome(
            record=read_sweep(self._ledger, self._sweep),
            report=report_directory,
            delivered=delivered,
            undelivered_reason=self._writer.last_error,
            signal=self._interrupts.signal,
            seconds=self._clock.seconds,
        )

    def _searcher(self) -> PackSearcher:
        record = read_sweep(self._ledger, self._sweep)
        # As it was created: trials that it was given later are in the ledger's events, which are replayed.
        spec, plan = record.spec, Plan.model_validate(record.created.plan)
        reduction = Reduction.of(spec)
        return PackSearcher(
            spec,
            reduction,
            trial_space(spec, reduction),
            trials=plan.trials,
            rungs=plan.rungs,
            pack=record.created.pack,
            lanes=record.created.lanes,
            # Who keeps checkpoints elsewhere need not share the state directory with the workers.
            cache=None if record.created.checkpoints else self._home.cache,
            checkpoints=storage.place_of(self._home, self._sweep, record.created.checkpoints),
            append=self._append,
        )

    def _run(self, searcher: PackSearcher, resources: nodes.Resources) -> Exception | None:
        """Runs the jobs and enters how they ended; returns what must be raised once everything is in order."""
        self._progress.stage("waiting for the first worker")
        failure: Exception | None = None
        state: SweepState = "finished"
        reason = ""
        try:
            jobs = _Watched(searcher, self._clock, self._interrupts)
            engine.run_jobs(
                jobs,
                resources=resources,
                workers=self._workers,
                poll=self._interrupts.check,
                tell=self._progress.stage,
            )
            if searcher.paused:
                state, reason = "paused", searcher.paused
            elif not searcher.finished:
                raise ClusterError("Ray Tune must run until the search is over; it ended before; resume the sweep")
        except Interrupted as interrupted:
            state, reason = "interrupted", signal.Signals(interrupted.signal).name
        except StateError as error:
            # The ledger was away, and nothing is wrong with the sweep: it can go on from there.
            state, reason, failure = "interrupted", "its ledger could not be reached", error
        except Exception as error:
            state, reason, failure = "failed", hide_passwords(f"{type(error).__name__}: {error}"), error
        self._clock.lap("certificates" if self._certifying else "trials")
        try:
            self._append([SweepEnded(state=state, reason=reason, seconds=dict(self._clock.seconds))])
        except StateError as error:
            failure = failure or error
        return failure

    def _append(self, events: list[Event]) -> None:
        self._ledger.append(self._sweep, events)
        self._writer.wake()
        for event in events:
            if isinstance(event, JobEnded):
                busy_s = event.train_s + event.eval_s
                if not self._training_began:
                    self._training_began = True
                    self._clock.lap("start-up", ago_s=busy_s)
                if not self._certifying:
                    self._clock.add("training, summed over workers", busy_s)
            elif isinstance(event, JobStarted) and self._certifying != (event.work == "certify"):
                # A certificate that an earlier driver began may come before trials that were added.
                self._clock.lap("certificates" if self._certifying else "trials")
                self._certifying = not self._certifying
        self._progress.events(self._sweep, events)

    def _write_report(self) -> Path | None:
        self._progress.stage("writing the report")
        try:
            with self._interrupts.held(False):
                directory = write_report(read_sweep(self._ledger, self._sweep), self._home)
        except Interrupted:
            return None
        self._append([ReportWritten(directory=str(directory))])
        self._clock.lap("report")
        return directory

    def _deliver(self) -> bool:
        try:
            with self._interrupts.held(False):
                delivered = self._writer.finish(_DELIVER_INTERRUPTED_S if self._interrupts.signal else _DELIVER_S)
        except Interrupted:
            delivered = self._writer.finish(_DELIVER_INTERRUPTED_S)
        self._clock.lap("waiting for MLflow")
        return delivered


class _Watched:
    """A searcher whose own time is booked, and which a signal may interrupt: a sampler can take seconds."""

    def __init__(self, searcher: PackSearcher, clock: Clock, interrupts: Interrupts) -> None:
        self._searcher, self._clock, self._interrupts = searcher, clock, interrupts

    @property
    def finished(self) -> bool:
        return self._searcher.finished

    def suggest(self) -> JobOrder | None:
        before_s = time.perf_counter()
        with self._interrupts.held(False):
            order = self._searcher.suggest()
        self._clock.add("sampling and pruning", time.perf_counter() - before_s)
        return order

    def complete(self, result: JobResult, *, wall_s: float = 0.0) -> None:
        self._searcher.complete(result, wall_s=wall_s)


def _tracking_uri(record: SweepRecord) -> str:
    """Where the sweep is tracked; the ledger keeps no passwords, so such an address comes from the environment."""
    stored = record.created.tracking_uri
    if MASK not in stored:
        return stored
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if hide_passwords(uri) == stored:
        return uri
    raise TrackingError(
        f"the sweep is tracked at {stored}, whose password is not kept: set MLFLOW_TRACKING_URI to that address"
    )


def _place(home: Home) -> str:
    """Where a driver's lock is: a ledger may be shared by several machines and state directories."""
    return f"{platform.node()}:{home.path}"


@contextlib.contextmanager
def closing_killed(home: Home, ledger: Ledger, *, spare: str | None = None) -> Iterator[None]:
    """Ends the sweeps whose driver was killed, in the ledger and in MLflow, while something else goes on.

    A killed driver could not say that it ended, and left its MLflow runs open. Such a sweep can still be resumed.

    Args:
        home: the state directory.
        ledger: its ledger.
        spare: the sweep that is about to be resumed.
    """
    writers = []
    for sweep in ledger.open_sweeps():
        with contextlib.suppress(StateError, TrackingError):  # driven by somebody, or tracked where we cannot go now
            record = read_sweep(ledger, sweep)
            # A lock says nothing about drivers of other places, and a service looks after its own.
            if sweep != spare and record.place in ("", _place(home)) and not record.in_queue:
                with home.driving(sweep):
                    ledger.append(sweep, [SweepEnded(state="interrupted", reason="its driver was killed")])
                writers.append(tracking.MlflowWriter(ledger, sweep, _tracking_uri(record), record.created.experiment))
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        for writer in writers:
            writer.finish(_DELIVER_INTERRUPTED_S)


@contextlib.contextmanager
def _cluster(
    home: Home, address: str | None, workers: int, progress: Progress, interrupts: Interrupts
) -> Iterator[None]:
    """The cluster, for as long as the context lasts; signals are held throughout, because Ray is at work."""
    progress.stage("starting Ray" if address is None else f"connecting to Ray at {address}")
    with interrupts.held(), engine.cluster(address, workers=workers, token_file=home.ray_token):
        interrupts.rearm()
        interrupts.check()
        yield
