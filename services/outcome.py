"""How a sweep came out, in words and as JSON, wherever it ran: what `run` and `watch` end with. Light: no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from services.words import best_as_json, best_lines, print_lines, short
from sweeps.best import best_point
from sweeps.collapse import Certificate
from sweeps.export import FORMATS
from sweeps.records import SweepRecord
from sweeps.reduction import Reduction
from sweeps.tracking_address import open_command, run_url


@dataclass(frozen=True, slots=True)
class Shown:
    """What is shown of a sweep that came to an end.

    Attributes:
        record: all that is known of it.
        state: where it stands.
        seconds: where the wall time went, by stage.
        delivered: whether MLflow has everything.
        report: directory of the report; None where there is none here.
        asked: what commands are given to ask where it ran, for whoever fetches report and exports by command; else
            None.
    """

    record: SweepRecord
    state: str
    seconds: Mapping[str, float]
    delivered: bool
    report: Path | None = None
    asked: str | None = None


def print_shown(shown: Shown, *, as_json: bool) -> None:
    """Prints how a sweep came out."""
    if as_json:
        click.echo(json.dumps(shown_as_json(shown), indent=2))
    else:
        for label, lines in _lines(shown):
            print_lines(label, lines)


def shown_as_json(shown: Shown) -> dict[str, Any]:
    """What `run --json` and `watch --json` end with."""
    record = shown.record
    counts, best = record.counts(), best_point(record)
    return {
        "sweep": record.id,
        "state": shown.state,
        "trials": {state: counts[state] for state in ("finished", "pruned", "diverged", "failed")},
        "best": best_as_json(best) if best else None,
        "mlflow": {
            "tracking_uri": record.created.tracking_uri,
            "experiment_id": record.experiment_id,
            "parent_run_id": record.parent_run_id,
            "delivered": shown.delivered,
        },
        "report": None if shown.report is None else str(shown.report / "report.html"),
        "certificates": [_certificate_as_json(certificate) for certificate in record.certificates],
        "seconds": dict(shown.seconds),
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


def _lines(shown: Shown) -> Iterator[tuple[str, list[str]]]:
    record = shown.record
    total_s = sum(seconds for stage, seconds in shown.seconds.items() if stage in _WALL)
    yield "sweep", [f"{record.id}: {shown.state} after {total_s:.0f} s"]
    yield "reduction", _reduction_lines(record)
    yield "trials", [_trials_in_words(record)]
    if record.tokens_per_s is not None:
        yield "speed", [f"{record.tokens_per_s:,.0f} tokens/s a worker, over its pack and without padding"]
    best = best_point(record)
    yield "best", best_lines(best) if best else ["no trial has finished"]
    yield "certificates", _certificate_lines(record)
    yield from _report_lines(shown)
    yield "MLflow", _mlflow_lines(record)


def _report_lines(shown: Shown) -> Iterator[tuple[str, list[str]]]:
    record = shown.record
    if shown.asked is not None:
        yield "report", [f"lora-sweeps report {record.id} --format html{shown.asked}"]
        if record.best:
            yield "export", [f"lora-sweeps export {record.id} --format {'|'.join(FORMATS)}{shown.asked}"]
    if shown.report is not None:
        yield "report", [short(shown.report / "report.html")]
        if record.best:
            exports = shown.report / "export"
            written = [form for form in FORMATS if not (exports / form / "refused.txt").exists()]
            yield "export", [f"{short(exports)} ({', '.join(written)})"]


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
    lines = [open_command(uri)]
    if record.experiment_id and record.parent_run_id:
        lines.append(run_url(uri, record.experiment_id, record.parent_run_id))
    return lines
