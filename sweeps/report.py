"""The collapse report: which configurations are one training run, the proof, and what the search found.

`build` gathers it from a sweep's record; `render` writes it as JSON, Markdown or HTML. The HTML is one file that works
offline: plots are SVG inside it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from pydantic import BaseModel, ConfigDict

from lora_core.files import write_atomically
from lora_core.gauge import Gauge, regauge
from lora_core.laws import Constant
from sweeps.best import Best, best_point, counts_in_words, unit_of
from sweeps.collapse import Certificate, TwinVerdict, twins
from sweeps.events import TrialState
from sweeps.plan import Plan
from sweeps.rank_scaling import RankScaling, answer
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.response_surface import Observation
from sweeps.space import Configuration

Format = Literal["md", "json", "html"]
FORMATS: tuple[Format, ...] = ("md", "json", "html")

_FAMILIES_SHOWN = 10
"""Classes that Markdown and HTML list; the JSON has all of them."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class AlphaMember(_Part):
    """A configuration of a class other than the one that was trained."""

    configuration: Configuration
    exact_in_binary: bool
    """Whether the gauge to it is made of powers of two: then the runs are equal to the last bit."""


class ReportedTrial(_Part):
    """One canonical point and the configurations that collapse onto it."""

    trial: int
    class_id: str
    configuration: Configuration
    state: TrialState | Literal["waiting"]
    value: float | None
    step: int
    metrics: dict[str, float]
    reason: str
    same_as: tuple[AlphaMember, ...]
    """The rest of its class, at the other alphas of the spec."""


class CollapseReport(_Part):
    """Everything the report says."""

    sweep: str
    name: str
    state: str
    created_at_s: float
    metric: str
    goal: str
    plan: Plan
    counts: dict[str, int]
    duplicates: int
    best: Best | None
    trials: tuple[ReportedTrial, ...]
    """Best first; then pruned, diverged and failed ones."""
    certificates: tuple[Certificate, ...]
    rank_scaling: RankScaling
    seconds: dict[str, float]
    tokens_per_s: float | None
    """Tokens trained a second by one worker, padding not counted; None where the task has none."""


def build(record: SweepRecord) -> CollapseReport:
    """Gathers the report of a sweep, whatever state it is in."""
    spec = record.spec
    reduction = Reduction.of(spec)
    order = ("finished", "pruned", "waiting", "diverged", "failed")
    sign = spec.metric.sign

    def rank(trial: TrialRecord) -> tuple[int, float, int]:
        value = math.inf if trial.value is None else sign * trial.value
        return order.index(trial.state), value, trial.number

    return CollapseReport(
        sweep=record.id,
        name=record.created.name,
        state=record.state,
        created_at_s=record.created_at_s,
        metric=spec.metric.name,
        goal=spec.metric.goal,
        plan=record.plan,
        counts=record.counts(),
        duplicates=len(record.trials) - len(record.trained),
        best=best_point(record),
        trials=tuple(_reported(trial, reduction) for trial in sorted(record.trained, key=rank)),
        certificates=tuple(Certificate.model_validate(certificate) for certificate in record.certificates),
        rank_scaling=_rank_scaling(record, reduction),
        seconds=record.seconds,
        tokens_per_s=record.tokens_per_s,
    )


def _rank_scaling(record: SweepRecord, reduction: Reduction) -> RankScaling:
    """What the trials say of how lr moves with rank; the same answer for the same trials, whenever it is asked."""
    spec, ranks = record.spec, reduction.space.ranks
    # A trial that failed says nothing of its point: its machine did.
    told = [trial for trial in record.trained if trial.state != "failed"]
    return answer(
        [_observation(trial, spec.metric.name, reduction) for trial in told],
        lr_searched="lr" in reduction.space.searched,
        alpha=reduction.reference.at(ranks[(len(ranks) - 1) // 2]),
        degree=reduction.law.degree,
        sign=spec.metric.sign,
        log_scale=spec.metric.name in spec.task.log_metrics,
        rng=np.random.default_rng(spec.search.seed),
    )


def _observation(trial: TrialRecord, metric: str, reduction: Reduction) -> Observation:
    """A trial in the gauge s = 1, with one factor for A and B: the ratio of their lrs stays."""
    point = replace(reduction.point(trial.configuration), clip_norm=None)
    unit = regauge(point, Gauge.of_alpha(1 / point.scaling), reduction.law)
    values = {rung.step: rung.metrics[metric] for rung in trial.rungs if metric in rung.metrics}
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    return Observation(
        trial=trial.number,
        rank=unit.rank,
        lr=unit.a.lr,
        init_scale=unit.init_scale,
        lr_ratio=trial.configuration.lr_ratio,
        values=finite,
        diverged=trial.state == "diverged" or len(finite) < len(values),
        head_lr=trial.configuration.head_lr,
    )


def _reported(trial: TrialRecord, reduction: Reduction) -> ReportedTrial:
    configuration = trial.configuration
    return ReportedTrial(
        trial=trial.number,
        class_id=trial.class_id,
        configuration=configuration,
        state=trial.state,
        value=trial.value,
        step=trial.step,
        metrics=trial.metrics,
        reason=trial.reason,
        same_as=tuple(
            AlphaMember(
                configuration=twin,
                exact_in_binary=reduction.gauge_between(configuration, twin).exact_in_binary,
            )
            for twin in twins(reduction, configuration, trial.class_id)
        ),
    )


def render(report: CollapseReport, form: Format) -> str:
    """Writes a report as Markdown, JSON or HTML."""
    if form == "json":
        return report.model_dump_json(indent=2)
    plots = _plots(report) if form == "html" else {}
    template = _templates().get_template(f"report.{form}.j2")
    return template.render(report=report, plots=plots, families_shown=_FAMILIES_SHOWN)


def _plots(report: CollapseReport) -> dict[str, str]:
    from sweeps import plots  # takes a second, which other formats need not wait for

    points = [(trial.configuration, trial.state, trial.value) for trial in report.trials]
    metric = f"{report.metric} ({unit})" if (unit := unit_of(report.metric).strip()) else report.metric
    return {
        "search": plots.search(points, metric=metric, goal=report.goal),
        "twins": plots.twins(report.certificates),
        "rank_scaling": plots.rank_scaling(report.rank_scaling),
    }


def write(report: CollapseReport, directory: Path) -> None:
    """Writes the report in all formats: `report.md`, `report.json`, `report.html`."""
    directory.mkdir(parents=True, exist_ok=True)
    for form in FORMATS:
        write_atomically(directory / f"report.{form}", render(report, form).encode())


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sweeps", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["g"] = lambda value, digits=4: "–" if value is None else f"{value:.{digits}g}"
    environment.filters["rest"] = _rest_in_words
    environment.filters["unit"] = unit_of
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["counts"] = counts_in_words
    environment.filters["constants"] = _constants_in_words
    environment.filters["distance"] = lambda twin: f"{twin.max_ratio:.2g}{_reservations(twin)}"
    environment.filters["error"] = _error_in_words
    environment.filters["signed"] = lambda value: "–" if value is None else f"{value:z.2f}"
    return environment


def _rest_in_words(point: Configuration | Best) -> str:
    """What a point has beside rank, alpha and lr; what is as usual is left out."""
    ratio = f", lr ratio {point.lr_ratio:.4g}" if point.lr_ratio != 1 else ""
    decay = f", weight decay {point.weight_decay:.4g}" if point.weight_decay else ""
    head = f", head lr {point.head_lr:.4g}" if point.head_lr else ""
    return f"init scale {point.init_scale:.4g}{ratio}{decay}{head}"


def _error_in_words(error: float | None) -> str:
    """The standard error of a logarithm, as the factor that it is: ` ×÷ 1.35`."""
    return "" if error is None else f" ×÷ {math.exp(error):.3g}"


def _reservations(twin: TwinVerdict) -> str:
    """` (heard in float64; judged to step 13)`: what a distance alone does not say."""
    return f" ({'; '.join(twin.reservations)})" if twin.reservations else ""


def _constants_in_words(constants: dict[str, Constant]) -> str:
    """`, eps 1e-08`: nothing where there are none."""
    said = [
        f"{name} {' to '.join(f'{each:.4g}' for each in value) if isinstance(value, tuple) else f'{value:.4g}'}"
        for name, value in constants.items()
    ]
    return "".join(f", {each}" for each in said)
