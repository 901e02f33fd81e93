"""What the command line prints: progress while a sweep runs, and results in words or JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

from services.words import best_as_json, best_lines, print_lines, short
from sweeps import tracking
from sweeps.best import best_point, counts_in_words
from sweeps.collapse import Certificate
from sweeps.driver import Outcome
from sweeps.events import Event, JobEnded, JobStarted, RungReported, SweepExtended, TrialAsked, TrialTold
from sweeps.export import FORMATS
from sweeps.interrupts import Interrupted, Interrupts
from sweeps.records import SweepRecord
from sweeps.reduction import Reduction

_LABEL_WIDTH = 14
_LINE_EVERY_S = 2.0


class Watcher:
    """Progress on stderr: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began_s = self._last_s = time.monotonic()
        self._told: Counter[str] = Counter()
        self._asked = self._steps = 0
        self._certificates = 0
        self._best: str = ""
        self._tokens, self._train_s = 0, 0.0

    def stage(self, text: str) -> None:
        """A new stage."""
        self._show(text, final=not self._terminal)

    def share(self, what: str, done: int, of: int) -> None:
        """How much of a long piece of work is done."""
        self.count(f"{what} {done:,} of {of:,} steps ({100 * done / of:.0f} %)")

    def count(self, text: str) -> None:
        """Something that changes often."""
        now_s = time.monotonic()
        if self._terminal or now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            self._show(text, final=not self._terminal)

    def events(self, sweep: str, events: list[Event]) -> None:
        """Counts what happened and shows it."""
        for event in events:
            match event:
                case TrialAsked() if event.duplicate_of is None:
                    self._asked += 1
                case TrialTold():
                    self._told[event.state] += 1
                case RungReported():
                    self._steps = max(self._steps, event.step)
                case JobEnded() if event.tokens is not None:
                    self._tokens += event.tokens
                    self._train_s += event.train_s
                case JobStarted() if event.work == "certify":
                    self._certificates += 1
                case SweepExtended():
                    self._certificates = 0  # trials come first again
                case _:
                    pass
        now_s = time.monotonic()
        if self._asked and (self._terminal or now_s - self._last_s >= _LINE_EVERY_S):
            self._last_s = now_s
            self._show(f"{sweep}: {self._line()}", final=not self._terminal)

    def close(self) -> None:
        """Clears the line."""
        if self._terminal:
            click.echo("\r\033[K", nl=False, err=True)

    def _line(self) -> str:
        if self._certificates:
            return f"certificate {self._certificates}"
        under_way = self._asked - self._told.total()
        ended = f"; {counts_in_words(self._told)}" if self._told else ""
        speed = f"; {self._tokens / self._train_s:,.0f} tokens/s a worker" if self._tokens else ""
        return f"{self._asked} trials asked, {under_way} under way{ended}{speed}"

    def _show(self, text: str, *, final: bool) -> None:
        line = f"[{time.monotonic() - self._began_s:5.1f} s] {text}"
        click.echo(line if final else f"\r\033[K{line}", nl=final, err=True)


@contextlib.contextmanager
def watching() -> Iterator[tuple[Watcher, Interrupts]]:
    """A watcher and the handling of signals for as long as a sweep runs.

    A signal before there is a sweep ends the program.
    """
    watcher = Watcher()
    try:
        with Interrupts().watching() as interrupts:
            yield watcher, interrupts
    except Interrupted as interrupted:
        watcher.close()
        click.echo("stopped before the sweep had begun; nothing was entered", err=True)
        sys.exit(128 + interrupted.signal)
    finally:
        watcher.close()


# -- the outcome of a run ----------------------------------------------------------------------------------------------


def print_outcome(outcome: Outcome, *, as_json: bool) -> int:
    """Prints how a sweep came out, and returns the exit code."""
    record = outcome.record
    if as_json:
        click.echo(json.dumps(outcome_as_json(outcome), indent=2))
    else:
        for label, lines in _outcome_lines(outcome):
            print_lines(label, lines)
    if not outcome.delivered:
        click.echo(
            f"MLflow does not have everything yet ({outcome.undelivered_reason}); the rest waits in the ledger and is "
            f"delivered by `lora-sweeps run --resume {record.id}`",
            err=True,
        )
    if outcome.signal is not None:
        click.echo(f"stopped; go on with `lora-sweeps run --resume {record.id}`", err=True)
        return 128 + outcome.signal
    if record.state == "paused":
        reason = record.ended.reason if record.ended else ""
        click.echo(f"paused: {reason}; mend that and `lora-sweeps run --resume {record.id}`", err=True)
        return 1
    return 0


def outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    """What `run --json` ends with."""
    record = outcome.record
    counts, best = record.counts(), best_point(record)
    return {
        "sweep": record.id,
        "state": record.state,
        "trials": {state: counts[state] for state in ("finished", "pruned", "diverged", "failed")},
        "best": best_as_json(best) if best else None,
        "mlflow": {
            "tracking_uri": record.created.tracking_uri,
            "experiment_id": record.experiment_id,
            "parent_run_id": record.parent_run_id,
            "delivered": outcome.delivered,
        },
        "report": None if outcome.report is None else str(outcome.report / "report.html"),
        "certificates": [_certificate_as_json(certificate) for certificate in record.certificates],
        "seconds": outcome.seconds,
        "tokens_per_s": record.tokens_per_s,
    }


def _certificate_as_json(certificate: dict[str, Any]) -> dict[str, Any]:
    """A certificate without its trajectories, which the report has."""
    verdicts = (
        "verdict",
        "exact_in_binary",
        "max_ratio",
        "first_step",
        "first_difference",
        "max_deviation",
        "envelope",
        "horizon",
        "in_float64",
        "cause",
        "configuration",
    )
    return {
        "class": certificate["class_id"],
        "trial": certificate["trial"],
        "steps": certificate["steps"],
        "representative": certificate["representative"],
        "twins": [{key: _finite(twin.get(key)) for key in verdicts} for twin in certificate["twins"]],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outcome_lines(outcome: Outcome) -> Iterator[tuple[str, list[str]]]:
    record = outcome.record
    total_s = sum(seconds for stage, seconds in outcome.seconds.items() if stage in _WALL)
    yield "sweep", [f"{record.id}: {record.state} after {total_s:.0f} s"]
    yield "reduction", _reduction_lines(record)
    yield "trials", [_trials_in_words(record)]
    if record.tokens_per_s is not None:
        yield "speed", [f"{record.tokens_per_s:,.0f} tokens/s a worker, over its pack and without padding"]
    best = best_point(record)
    yield "best", best_lines(best) if best else ["no trial has finished"]
    yield "certificates", _certificate_lines(record)
    if outcome.report is not None:
        yield "report", [short(outcome.report / "report.html")]
        if record.best:
            exports = outcome.report / "export"
            written = [form for form in FORMATS if not (exports / form / "refused.txt").exists()]
            yield "export", [f"{short(exports)} ({', '.join(written)})"]
    yield "MLflow", _mlflow_lines(record)


_WALL = ("start-up", "trials", "certificates", "report", "waiting for MLflow")
"""Stages that follow one another; others run beside them."""


def _reduction_lines(record: SweepRecord) -> list[str]:
    plan = record.plan
    before, after = (", ".join(plan.dimensions[side]) for side in ("before", "after"))
    lines = [f"{before} -> {after}"]
    if plan.configurations is not None:
        lines.insert(0, f"{plan.configurations} configurations -> {plan.classes} classes")
    else:
        reduction, trained = Reduction.of(record.spec), record.trained
        covered = sum(1 + len(reduction.twins(trial.configuration)) for trial in trained)
        lines.append(f"{covered} configurations -> the {len(trained)} classes that were trained")
    return lines


def _trials_in_words(record: SweepRecord) -> str:
    shown = {state: count for state, count in record.counts().items() if count or state != "waiting"}
    words = ", ".join(f"{count} {state}" for state, count in shown.items())
    duplicates = len(record.trials) - len(record.trained)
    return f"{len(record.trained)}: {words}" + (
        f"; known points proposed again and not trained: {duplicates}" if duplicates else ""
    )


def _certificate_lines(record: SweepRecord) -> list[str]:
    if not record.certificates:
        return ["none"]
    certificates = [Certificate.model_validate(certificate) for certificate in record.certificates]
    verdicts = Counter(twin.verdict for certificate in certificates for twin in certificate.twins)
    whole = sum(certificate.holds for certificate in certificates)
    words = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return [f"{whole} of {len(certificates)} classes collapse; twins: {words}"]


def _mlflow_lines(record: SweepRecord) -> list[str]:
    uri = record.created.tracking_uri
    lines = [tracking.open_command(uri)]
    if record.experiment_id and record.parent_run_id:
        lines.append(tracking.run_url(uri, record.experiment_id, record.parent_run_id))
    return lines
