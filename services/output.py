"""What the command line prints: progress while a sweep runs, and results in words or JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from sweeps import tracking
from sweeps.collapse import Certificate
from sweeps.driver import Outcome
from sweeps.events import Event, JobEnded, JobStarted, RungReported, SweepExtended, TrialAsked, TrialTold
from sweeps.export import FORMATS
from sweeps.home import Home
from sweeps.interrupts import Interrupted, Interrupts
from sweeps.plan import Plan
from sweeps.records import SweepRecord
from sweeps.reduction import Reduction
from sweeps.report import best_point, counts_in_words, unit_of
from sweeps.spec import SweepSpec

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
            _print_lines(label, lines)
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
    counts = record.counts()
    return {
        "sweep": record.id,
        "state": record.state,
        "trials": {state: counts[state] for state in ("finished", "pruned", "diverged", "failed")},
        "best": best_as_json(record) if record.best else None,
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
    yield "best", best_lines(record) if record.best else ["no trial has finished"]
    yield "certificates", _certificate_lines(record)
    if outcome.report is not None:
        yield "report", [_short(outcome.report / "report.html")]
        if record.best:
            exports = outcome.report / "export"
            written = [form for form in FORMATS if not (exports / form / "refused.txt").exists()]
            yield "export", [f"{_short(exports)} ({', '.join(written)})"]
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


# -- the best point ----------------------------------------------------------------------------------------------------


def best_as_json(record: SweepRecord) -> dict[str, Any]:
    """What `best --json` prints."""
    found = best_point(record)
    assert found is not None, "asked only where a trial has finished"
    fields = found.model_dump(mode="json")
    fields["class"] = fields.pop("class_id")
    return fields


def best_lines(record: SweepRecord) -> list[str]:
    """The best point in words."""
    found = best_point(record)
    assert found is not None, "asked only where a trial has finished"
    measured = ", ".join(f"{name} {value:.4g}{unit_of(name)}" for name, value in found.metrics.items())
    default = found.default_init
    ratio = f", lr ratio {found.lr_ratio:.4g}" if found.lr_ratio != 1 else ""
    decay = f", weight decay {found.weight_decay:.4g}" if found.weight_decay else ""
    head = f", head lr {found.head_lr:.4g}" if found.head_lr else ""
    return [
        f"{measured} (trial {found.trial})",
        f"rank {found.rank}, alpha {found.alpha:g}, lr {found.lr:.4g}, init scale {found.init_scale:.4g}{ratio}{decay}"
        + head,
        f"with default init the same run is alpha {default.alpha:.4g}, lr {default.lr:.4g}{ratio}"
        + (f", weight decay {default.weight_decay:.4g}" if found.weight_decay else "")
        + head,
    ]


def print_best(record: SweepRecord) -> None:
    """Prints the best point in words."""
    _print_lines("best", best_lines(record))


# -- plans and lists ---------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    """Prints a plan in words."""
    counts = f"{plan.configurations} configurations -> {plan.classes} classes; " if plan.configurations else ""
    before, after = (", ".join(plan.dimensions[side]) for side in ("before", "after"))
    rungs = ", ".join(map(str, plan.rungs))
    cost = f"about {plan.member_steps} member-steps"
    _print_lines("law", [plan.law])
    _print_lines("reduction", [f"{counts}{before} -> {after}", f"alpha held at {plan.reference_alpha}"])
    _print_lines("space", [_dimension_in_words(dimension) for dimension in plan.space])
    _print_lines("outside", [f"{100 * plan.outside.share:.1f} % of the space as written: {plan.outside.explanation}"])
    _print_lines("search", [f"{plan.method}, {plan.trials} trials, reporting at steps {rungs}"])
    packs = [f"of {plan.pack} on {plan.workers} workers"]
    if plan.base_bytes is not None and plan.member_bytes is not None:
        packs.append(f"each takes {_size(plan.base_bytes)} and {_size(plan.member_bytes)} a member")
    _print_lines("packs", packs)
    _print_lines("dtype", [plan.dtype or "float32"])
    _print_lines("certificates", [f"{plan.certificates} classes"])
    if plan.seconds is not None:
        cost += f", {plan.seconds:.0f} s of training on this machine (start-up and search not counted)"
    elif plan.untimed:
        cost += f"; their time was not measured, for {plan.untimed}"
    _print_lines("cost", [cost])
    if plan.warnings:
        _print_lines("warnings", list(plan.warnings))


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(0.1, size / 1e6):.1f} MB"


def _dimension_in_words(dimension: dict[str, Any]) -> str:
    if "values" in dimension:
        return f"{dimension['name']}: {', '.join(f'{value:g}' for value in dimension['values'])}"
    return f"{dimension['name']}: {dimension['min']:g} to {dimension['max']:g}, {dimension['distribution']}"


def classes_of(spec: SweepSpec) -> list[dict[str, Any]] | None:
    """Every class of a finite space with its member configurations; None where the space is continuous."""
    classes = Reduction.of(spec).classes
    if classes is None:
        return None
    return [
        {
            "class": found.id,
            "representative": asdict(found.representative),
            "members": [asdict(configuration) for configuration in found.configurations],
        }
        for found in classes
    ]


def summary(record: SweepRecord, home: Home) -> dict[str, Any]:
    """One sweep of a list."""
    state = record.state
    if state == "running" and not home.is_driven(record.id):
        state = "interrupted"  # its driver was killed before it could say so
    best = record.best
    return {
        "sweep": record.id,
        "name": record.created.name,
        "state": state,
        "created": datetime.fromtimestamp(record.created_at_s, UTC).isoformat(timespec="seconds"),
        "trials": record.counts(),
        "metric": record.spec.metric.name,
        "best": None if best is None else best.value,
    }


def print_sweeps(summaries: list[dict[str, Any]]) -> None:
    """Prints a list of sweeps in columns."""
    if not summaries:
        click.echo("no sweeps yet: start one with `lora-sweeps run SPEC`", err=True)
        return
    rows = [("sweep", "state", "created (UTC)", "best", "trials")]
    for one in summaries:
        best = "–" if one["best"] is None else f"{one['metric']} {one['best']:.4g}{unit_of(one['metric'])}"
        rows.append((one["sweep"], one["state"], one["created"][:19], best, counts_in_words(one["trials"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_lines(label: str, lines: list[str]) -> None:
    for i, line in enumerate(lines):
        click.echo(f"{label if i == 0 else '':<{_LABEL_WIDTH}}{line}")


def _short(path: Path) -> str:
    """The path from the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
