"""The words by which MLflow shows a sweep: params, tags and the description on its page. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from sweeps.collapse import Certificate, TwinVerdict
from sweeps.events import SweepCreated
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.secrecy import hide_passwords
from sweeps.space import DIMENSIONS, Configuration
from sweeps.spec import SweepSpec

_LONGEST_TAG = 4900
"""Characters; MLflow's servers cut or refuse tags above 5000 or 8000, by version."""

_SHOWN = 5
"""Trials in the description's table."""


def sweep_params(spec: SweepSpec, reduction: Reduction, created: SweepCreated) -> dict[str, str]:
    """The parent's params."""
    values = {
        "task": spec.task.type,
        "optimizer": spec.train.optimizer,
        "steps": spec.train.steps,
        "batch_size": spec.train.batch_size,
        "schedule": spec.train.schedule,
        "seed": spec.train.seed,
        "metric": spec.metric.name,
        "goal": spec.metric.goal,
        "method": spec.search.method,
        "search_seed": spec.search.seed,
        "pruner": spec.search.pruner.type,
        "searched": ", ".join(reduction.space.searched),
        "alpha_reference": reduction.reference,
        "eliminated": ", ".join(reduction.eliminated) or "nothing",
        "pack": created.pack,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def trial_params(configuration: Configuration, optimizer: str) -> dict[str, str]:
    """A child's params."""
    values = {
        "rank": configuration.rank,
        "alpha": configuration.alpha,
        "lr": configuration.lr,
        "init_scale": configuration.init_scale,
        "lr_ratio": configuration.lr_ratio,
        "weight_decay": configuration.weight_decay,
        "head_lr": configuration.head_lr or None,
        "optimizer": optimizer,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def alpha_family(reduction: Reduction, configuration: Configuration) -> dict[str, str]:
    """The other values of alpha at which a trial is the same training run; nothing where there are none."""
    lines = [
        f"alpha={twin.alpha:g}: lr={twin.lr:.6g}, init_scale={twin.init_scale:.6g}"
        + (f", lr_ratio={twin.lr_ratio:.6g}" if twin.lr_ratio != 1 else "")
        for twin in reduction.twins(configuration)
    ]
    return {"lora_sweeps.same_training_as": tag("\n".join(lines))} if lines else {}


def twin_tags(certificate: Certificate, twin: TwinVerdict) -> dict[str, str]:
    """How a twin compares with its representative."""
    tags = {
        "lora_sweeps.twin_of_trial": str(certificate.trial),
        "lora_sweeps.class_id": certificate.class_id,
        "lora_sweeps.verdict": twin.verdict,
        "lora_sweeps.exact_in_binary": str(twin.exact_in_binary).lower(),
        "lora_sweeps.max_ratio": f"{twin.max_ratio:g}",
    }
    return tags if twin.first_step is None else tags | {"lora_sweeps.first_step": str(twin.first_step)}


def best_tags(best: TrialRecord, reduction: Reduction) -> dict[str, str]:
    """The best trial; tags, because a resumed sweep may find a better one and MLflow refuses to change a param."""
    at = {name: str(getattr(best.configuration, name)) for name in _shown_dimensions(reduction)}
    return {"lora_sweeps.best_trial": str(best.number)} | {
        f"lora_sweeps.best_{name}": value for name, value in at.items()
    }


def _shown_dimensions(reduction: Reduction) -> tuple[str, ...]:
    """What is told of a point: what makes every LoRA run, and whatever else is searched."""
    shown = {"rank", "alpha", "lr", "init_scale", *reduction.space.searched}
    return tuple(name for name in DIMENSIONS if name in shown)


def description(record: SweepRecord) -> str:
    """What the parent's page says, in Markdown."""
    spec, reduction = record.spec, Reduction.of(record.spec)
    counts = ", ".join(f"{count} {state}" for state, count in record.counts().items() if count)
    parts = [
        f"**{spec.name}**: LoRA sweep over {', '.join(reduction.space.searched)} with {spec.train.optimizer} "
        f"({spec.task.type}, {spec.train.steps} steps).",
        _reduction_sentence(reduction),
        f"Trials: {counts or 'none yet'}.",
    ]
    if record.ended is not None and record.ended.state != "finished":
        parts.append(
            f"The sweep was {record.ended.state}" + (f": {record.ended.reason}" if record.ended.reason else ".")
        )
    if ranked := record.ranked()[:_SHOWN]:
        parts.append("\n".join(_table(ranked, spec, _shown_dimensions(reduction))))
    return tag("\n\n".join(parts))


def _reduction_sentence(reduction: Reduction) -> str:
    if reduction.stuck is not None:
        return f"alpha was not eliminated: {reduction.stuck}."
    if not reduction.eliminated:
        return "Nothing was eliminated: alpha is a constant of this sweep."
    return (
        f"Eliminated: {' and '.join(reduction.eliminated)}, because alpha is a gauge ({reduction.law.describe()}); "
        f"every trial is written at alpha = {reduction.reference}."
    )


def _table(ranked: list[TrialRecord], spec: SweepSpec, dimensions: tuple[str, ...]) -> Iterator[str]:
    metric = spec.metric.name
    unit = " (nats)" if metric.endswith("loss") else ""
    with_accuracy = metric != "eval/accuracy" and any("eval/accuracy" in trial.metrics for trial in ranked)
    columns = ["trial", *dimensions, metric + unit] + ["eval/accuracy"] * with_accuracy
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---:|" * len(columns)
    for trial in ranked:
        at = trial.configuration
        cells = [str(trial.number)]
        # Ranks and alphas are exact; the others come from a sampler.
        cells += [f"{getattr(at, name):{'g' if name in ('rank', 'alpha') else '.3g'}}" for name in dimensions]
        cells += [f"{trial.value:.4g}"] + [f"{trial.metrics.get('eval/accuracy', math.nan):.4g}"] * with_accuracy
        yield f"| {' | '.join(cells)} |"


def metric_key(key: str) -> str:
    """MLflow's metric keys have letters, digits, and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def tag(text: str) -> str:
    """Text as a tag: without secrets, and of a length that every MLflow takes."""
    text = hide_passwords(text)  # first, because half an address no longer looks like one
    return text if len(text) <= _LONGEST_TAG else text[: _LONGEST_TAG - 2] + " …"
