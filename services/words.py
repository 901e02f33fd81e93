"""Points, plans and lists of sweeps, in words and as JSON. Light: no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from services.schemas import ENDED, Accepted, SweepStatus, SweepSummary
from sweeps.best import Best, counts_in_words, unit_of
from sweeps.plan import Plan
from sweeps.reduction import Reduction
from sweeps.spec import SweepSpec
from sweeps.tracking_address import open_command

_LABEL_WIDTH = 14


# -- the best point ----------------------------------------------------------------------------------------------------


def best_as_json(found: Best) -> dict[str, Any]:
    """What `best --json` prints."""
    fields = found.model_dump(mode="json")
    fields["class"] = fields.pop("class_id")
    return fields


def best_lines(found: Best) -> list[str]:
    """The best point in words."""
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


def print_best(found: Best) -> None:
    """Prints the best point in words."""
    print_lines("best", best_lines(found))


# -- plans and lists ---------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    """Prints a plan in words."""
    for label, lines in plan_lines(plan):
        print_lines(label, lines)


def plan_lines(plan: Plan) -> list[tuple[str, list[str]]]:
    """A plan in words: lines, and what they are about."""
    counts = f"{plan.configurations} configurations -> {plan.classes} classes; " if plan.configurations else ""
    before, after = (", ".join(plan.dimensions[side]) for side in ("before", "after"))
    rungs = ", ".join(map(str, plan.rungs))
    cost = f"about {plan.member_steps} member-steps"
    if plan.seconds is not None:
        cost += f", {plan.seconds:.0f} s of training on this machine (start-up and search not counted)"
    elif plan.untimed:
        cost += f"; their time was not measured, for {plan.untimed}"
    packs = [f"of {plan.pack} on {plan.workers} workers"]
    if plan.base_bytes is not None and plan.member_bytes is not None:
        packs.append(f"each takes {_size(plan.base_bytes)} and {_size(plan.member_bytes)} a member")
    found = [
        ("law", [plan.law]),
        ("reduction", [f"{counts}{before} -> {after}", f"alpha held at {plan.reference_alpha}"]),
        ("space", [_dimension_in_words(dimension) for dimension in plan.space]),
        ("outside", [f"{100 * plan.outside.share:.1f} % of the space as written: {plan.outside.explanation}"]),
        ("search", [f"{plan.method}, {plan.trials} trials, reporting at steps {rungs}"]),
        ("packs", packs),
        ("dtype", [plan.dtype or "float32"]),
        ("certificates", [f"{plan.certificates} classes"]),
        ("cost", [cost]),
    ]
    return [*found, ("warnings", list(plan.warnings))] if plan.warnings else found


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


def print_sweeps(summaries: Sequence[SweepSummary], *, empty: str) -> None:
    """Prints a list of sweeps in columns; on stderr, what to do where there are none."""
    if not summaries:
        click.echo(empty, err=True)
        return
    owned = any(one.owner for one in summaries)  # nobody owns what was run by hand
    rows = [("sweep", *(("owner",) if owned else ()), "state", "created (UTC)", "best", "trials")]
    for one in summaries:
        best = "–" if one.best is None else f"{one.metric} {one.best:.4g}{unit_of(one.metric)}"
        owner = (one.owner or "–",) if owned else ()
        rows.append((one.sweep, *owner, one.state, one.created[:19], best, counts_in_words(one.trials)))
    print_table(rows)


# -- one sweep ---------------------------------------------------------------------------------------------------------


def print_status(found: SweepStatus) -> None:
    """Prints how a sweep stands."""
    progress, mlflow = found.progress, found.mlflow
    print_lines("sweep", [f"{found.sweep}: {with_reason(found.state, found.reason)}"])
    seen = ", shared with all users" if found.shared else ""
    if found.owner:
        print_lines("owner", [f"{found.owner}, priority {found.priority}{seen}"])
    print_lines("created", [f"{found.created[:19]} UTC"])
    ended = f"{progress.trials_ended} of {progress.trials_planned} ended: {counts_in_words(found.trials)}"
    at_work = f"; {_counted(progress.jobs_under_way, 'job')} under way" if found.state not in ENDED else ""
    print_lines("trials", [ended + at_work])
    print_lines("certificates", [f"{progress.certificates} of {progress.certificates_planned} made"])
    if progress.tokens_per_s is not None:
        print_lines("speed", [f"{progress.tokens_per_s:,.0f} tokens/s a worker, over its pack and without padding"])
    print_lines("best", best_lines(found.best_point) if found.best_point else ["no trial has finished"])
    if found.seconds:
        print_lines("time", [", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found.seconds.items())])
    if found.owner:
        print_lines("used", [f"{found.device_hours:.2g} device-hours"])
    behind = [] if mlflow.delivered else ["does not have everything yet"]
    print_lines("MLflow", [open_command(mlflow.tracking_uri), *([mlflow.url] if mlflow.url else []), *behind])
    if found.ray_url:
        print_lines("Ray", [found.ray_url])


def print_accepted(accepted: Accepted, *, server: str) -> None:
    """Prints that a sweep was accepted, what it would run, and how to watch it."""
    plan = accepted.plan
    before, after = (", ".join(plan.dimensions[side]) for side in ("before", "after"))
    counts = f"{plan.configurations} configurations -> {plan.classes} classes; " if plan.configurations else ""
    trials = f"{_counted(plan.trials, 'trial')} ({plan.method}) in packs of {plan.pack} on "
    certified = f"{_counted(plan.certificates, 'class', 'es')} certified"
    print_lines("sweep", [f"{accepted.sweep}: {with_reason(accepted.state, accepted.reason)}"])
    print_lines("plan", [f"{counts}{before} -> {after}", f"{trials}{_counted(plan.workers, 'worker')}; {certified}"])
    if plan.warnings:
        print_lines("warnings", list(plan.warnings))
    print_lines("watch", [f"lora-sweeps watch {accepted.sweep}{server}"])


def with_reason(state: str, reason: str) -> str:
    """A state, and why."""
    return f"{state} ({reason})" if reason else state


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


# -- how it is printed -------------------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """Prints one JSON object."""
    click.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows in columns, the heads first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_lines(label: str, lines: list[str]) -> None:
    """Prints lines with a label in front of the first."""
    for i, line in enumerate(lines):
        click.echo(f"{label if i == 0 else '':<{_LABEL_WIDTH}}{line}")


def short(path: Path) -> str:
    """The path from the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
