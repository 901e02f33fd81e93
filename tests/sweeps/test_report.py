"""The report of a sweep in any state, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweeps.collapse import Certificate, TwinVerdict
from sweeps.events import JobStarted, RungReported, SweepCreated, SweepEnded, TrialAsked, TrialTold
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.records import SweepRecord, read_sweep
from sweeps.reduction import Reduction
from sweeps.report import FORMATS, build, render, write
from sweeps.space import Configuration
from sweeps.spec import parse_spec
from tests.support import SMALL_SPEC


def record_with(tmp_path: Path, *events: object, text: str = SMALL_SPEC) -> SweepRecord:
    spec = parse_spec(text, "small.yaml").spec
    plan = make_plan(spec, Reduction.of(spec), workers=2, most_members=64)
    tmp_path.mkdir(exist_ok=True)
    ledger = Ledger.in_directory(tmp_path)
    ledger.create(
        "small-1",
        SweepCreated(
            name="small",
            spec=spec.model_dump(mode="json"),
            spec_text=text,
            source="small.yaml",
            plan=plan.model_dump(mode="json"),
            tracking_uri="sqlite:///mlflow.db",
            experiment="small",
            lanes=3,
            pack=4,
        ),
    )
    ledger.append("small-1", events)
    return read_sweep(ledger, "small-1")


def trial(number: int, state: str, value: float | None, lr: float = 0.01) -> list[object]:
    configuration = Configuration(rank=2 + 2 * (number % 2), alpha=16.0, lr=lr, init_scale=1.0)
    asked = TrialAsked(trial=number, values={}, configuration=configuration, class_id=f"c-{number}")
    metrics = {} if value is None else {"eval/loss": value, "eval/accuracy": 0.5}
    rung = [RungReported(trial=number, job=0, step=40, metrics=metrics)] if value is not None else []
    return [asked, *rung, TrialTold(trial=number, state=state, value=value, reason="because")]


def certificate(verdict: str) -> Certificate:
    configuration = Configuration(rank=2, alpha=16.0, lr=0.01)
    twin = TwinVerdict(
        configuration=Configuration(rank=2, alpha=64.0, lr=0.005, init_scale=0.5),
        exact_in_binary=verdict == "bit-identical",
        verdict=verdict,
        max_ratio=float("inf") if verdict == "different" else 0.0,
        first_step=2 if verdict == "different" else None,
        losses=(2.0, 1.0) if verdict == "bit-identical" else (2.0, 1.5),
        update_norms={"fc1": (0.0, 0.1)},
    )
    return Certificate(
        class_id="c-0",
        trial=0,
        steps=2,
        representative=configuration,
        losses=(2.0, 1.0),
        update_norms={"fc1": (0.0, 0.1)},
        controls=4,
        twins=(twin,),
    )


@pytest.mark.parametrize("form", FORMATS)
def test_a_sweep_without_a_finished_trial_has_a_report_too(tmp_path: Path, form: str):
    ended = SweepEnded(state="interrupted", reason="SIGINT")
    text = render(build(record_with(tmp_path, *trial(0, "diverged", None), ended)), form)
    assert "small-1" in text
    assert "interrupted" in text
    if form != "json":
        assert "No trial has finished" in text
        assert "No class was certified" in text


def test_trials_are_told_best_first_whichever_way_is_better(tmp_path: Path):
    events = [
        *trial(0, "finished", 0.5),
        *trial(1, "finished", 0.2),
        *trial(2, "pruned", 0.1),
        *trial(3, "failed", None),
    ]
    down = build(record_with(tmp_path / "down", *events))
    assert [t.trial for t in down.trials] == [1, 0, 2, 3]
    assert down.best is not None
    assert down.best.trial == 1
    upward = SMALL_SPEC + "metric: {name: eval/loss, goal: maximize}\n"
    up = build(record_with(tmp_path / "up", *events, text=upward))
    assert [t.trial for t in up.trials] == [0, 1, 2, 3]


def test_every_trial_lists_the_configurations_that_collapse_onto_it(tmp_path: Path):
    report = build(record_with(tmp_path, *trial(0, "finished", 0.5)))
    members = {member.configuration.alpha: member for member in report.trials[0].same_as}
    assert set(members) == {4.0, 8.0, 32.0, 64.0}
    assert members[64.0].configuration.lr == 0.005
    assert members[64.0].configuration.init_scale == 0.5
    assert {alpha for alpha, member in members.items() if member.exact_in_binary} == {4.0, 64.0}


@pytest.mark.parametrize("verdict", ["bit-identical", "identical up to rounding", "different"])
def test_verdicts_stand_in_every_format(tmp_path: Path, verdict: str):
    report = build(record_with(tmp_path, *trial(0, "finished", 0.5)))
    proven = report.model_copy(update={"certificates": (certificate(verdict),)})
    for form in FORMATS:
        assert verdict in render(proven, form)
    assert ("0 of 1" in render(proven, "html")) == (verdict == "different")


def test_what_a_user_wrote_cannot_become_markup(tmp_path: Path):
    events = [*trial(0, "failed", None)]
    record = record_with(tmp_path, *events)
    report = build(record).model_copy(update={"sweep": "<script>alert(1)</script>"})
    assert "<script>" not in render(report, "html")


def test_the_json_is_the_whole_report_and_reads_back(tmp_path: Path):
    report = build(record_with(tmp_path, *trial(0, "finished", 0.5), JobStarted(job=0, trials=(0,), start=0, stop=40)))
    write(report, tmp_path / "out")
    assert type(report).model_validate_json((tmp_path / "out" / "report.json").read_text()) == report
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sweep"] == "small-1"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.json", "report.html"}
