"""The report of a sweep in any state, in every format."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sweeps import plots
from sweeps.collapse import Certificate, TwinVerdict
from sweeps.events import JobEnded, JobStarted, RungReported, SweepCreated, SweepEnded, TrialAsked, TrialTold
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.records import SweepRecord, read_sweep
from sweeps.reduction import Reduction
from sweeps.report import FORMATS, build, render, write
from sweeps.space import Configuration
from sweeps.spec import parse_spec
from tests.conftest import FinishedSweep
from tests.support import SMALL_SPEC, record_of


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


@pytest.mark.parametrize("form", FORMATS)
def test_tokens_a_second_are_told_where_they_were_counted(tmp_path: Path, form: str):
    ended = JobEnded(job=0, train_s=2.0, tokens=24_691)
    counted = render(build(record_with(tmp_path / "a", *trial(0, "finished", 1.0), ended)), form)
    assert ('"tokens_per_s": 12345.5' if form == "json" else "trained 12,346 tokens/s") in counted
    plain = render(build(record_with(tmp_path / "b", *trial(0, "finished", 1.0))), form)
    assert ('"tokens_per_s": null' in plain) if form == "json" else ("tokens/s" not in plain)


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


# -- how lr moves with rank --------------------------------------------------------------------------------------------

REFERENCES = {
    "constant alpha = 16": ("alpha: 16", "rslora: false"),
    "alpha = r": ("alpha: rank", "rslora: false"),
    "alpha = 2r": ('alpha: "2*rank"', "rslora: false"),
    "rsLoRA, alpha = 16": ("alpha: 16", "rslora: true"),
}
"""By convention: what a spec says whose reference it is."""


def swept(convention: str, *, optimizer: str = "adamw", rungs: bool = True) -> tuple[str, list[object]]:
    """A spec, and trials in whose own convention the best lr is 0.01 at every rank."""
    alpha, rslora = REFERENCES[convention]
    text = f"""\
name: small
task: {{type: digits}}
lora: {{target_modules: [fc1, fc2], {rslora}}}
parameters:
  rank: {{values: [2, 4, 8, 16, 32]}}
  lr: {{min: 1e-3, max: 1e-1}}
  init_scale: {{min: 0.25, max: 4}}
  {alpha}
train: {{optimizer: {optimizer}, steps: 40, batch_size: 16}}
"""
    reference, rng, events = Reduction.of(parse_spec(text, "small.yaml").spec).reference, np.random.default_rng(0), []
    for number in range(80):
        rank = (2, 4, 8, 16, 32)[number % 5]
        lr, init_scale = math.exp(rng.uniform(math.log(1e-3), math.log(1e-1))), math.exp(rng.uniform(-1.3, 1.3))
        loss = math.exp(0.2 * math.log(lr / 0.01) ** 2 + 0.1 * math.log(init_scale) ** 2 + rng.normal(0, 0.02))
        point = Configuration(rank=rank, alpha=reference.at(rank), lr=lr, init_scale=init_scale)
        events += [TrialAsked(trial=number, values={}, configuration=point, class_id=f"c-{number}")]
        if rungs:
            events += [RungReported(trial=number, job=0, step=40, metrics={"eval/loss": loss})]
            events += [TrialTold(trial=number, state="finished", value=loss)]
    return text, events


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("convention", REFERENCES)
def test_the_report_names_the_convention_that_frees_lr_from_rank(tmp_path: Path, convention: str, optimizer: str):
    text, events = swept(convention, optimizer=optimizer)
    report = build(record_with(tmp_path, *events, text=text))
    expected = ("alpha = r", "alpha = 2r") if convention in ("alpha = r", "alpha = 2r") else (convention,)
    assert report.rank_scaling.flattest == expected
    # The best trial stands as it was trained in the convention that was the sweep's own.
    (own,) = (one for one in report.rank_scaling.conventions if one.name == convention)
    trained = {trial.trial: trial.configuration for trial in report.trials}
    for seen, best in zip(report.rank_scaling.ranks, own.best, strict=True):
        assert best.observed_lr == pytest.approx(trained[seen.best_trial].lr)
        assert best.observed_init_scale == pytest.approx(trained[seen.best_trial].init_scale)
        assert best.lr == pytest.approx(0.01, rel=0.25)


def test_every_format_says_how_lr_moves_with_rank(tmp_path: Path):
    text, events = swept("alpha = r")
    report = build(record_with(tmp_path, *events, text=text))
    for form in FORMATS:
        assert "most nearly independent of rank with alpha = r or alpha = 2r" in render(report, form)
    markdown, html = render(report, "md"), render(report, "html")
    slope = report.rank_scaling.conventions[0].slope
    for words in ("## How lr moves with rank", "| 32 | 16 | fitted | lr ", f"| {slope:.2f} |", "step 40 of 40"):
        assert words in markdown
    svg = html[html.index("<h2>How lr moves with rank") :]
    assert "The best learning rate over rank" in svg
    assert json.loads(render(report, "json"))["rank_scaling"]["step"] == 40
    assert type(report).model_validate_json(render(report, "json")) == report


def test_losses_that_are_not_finite_take_no_part(tmp_path: Path):
    text, events = swept("alpha = r")
    lost = [
        TrialAsked(trial=90, values={}, configuration=Configuration(rank=2, alpha=2.0, lr=0.01), class_id="c-90"),
        RungReported(trial=90, job=0, step=40, metrics={"eval/loss": math.nan}),
        TrialTold(trial=90, state="diverged", reason="because"),
        *trial(91, "failed", None),
    ]
    found = build(record_with(tmp_path, *events, *lost, text=text)).rank_scaling
    assert [rank.diverged for rank in found.ranks] == [1, 0, 0, 0, 0]
    assert found.flattest == ("alpha = r", "alpha = 2r")


def test_a_sweep_that_has_just_begun_has_nothing_to_say_of_rank(tmp_path: Path):
    text, events = swept("alpha = r", rungs=False)
    report = build(record_with(tmp_path, *events, text=text))
    assert "No trial has reported a value yet" in report.rank_scaling.conclusion
    for form in FORMATS:
        assert "No trial has reported a value yet" in render(report, form)


def test_a_constant_lr_is_said_to_be_one(tmp_path: Path):
    text = SMALL_SPEC.replace("lr: {min: 1e-3, max: 1e-1}", "lr: 0.01")
    report = build(record_with(tmp_path, *trial(0, "finished", 0.5), *trial(1, "finished", 0.4), text=text))
    assert "lr is a constant" in report.rank_scaling.conclusion
    assert "lr is a constant" in render(report, "html")


def test_the_report_of_a_real_sweep_says_how_lr_moves_or_what_is_missing(finished: FinishedSweep):
    report = build(record_of(finished.cwd))
    found = report.rank_scaling
    assert [rank.rank for rank in found.ranks] == [2, 4, 8]
    assert found.step in report.plan.rungs
    assert bool(found.flattest) != ("do not suffice" in found.conclusion)
    for rank in found.ranks:
        here = [one for one in report.trials if one.configuration.rank == rank.rank]
        assert rank.trials <= len(here)
    for form in ("md", "html"):
        assert "How lr moves with rank" in render(report, form)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("rprop", "step_sizes 2.5e-07 to 12.5"),
        ("adagrad", "eps 4e-10, initial_accumulator_value 0"),
        ("asgd", "lambd 0.0016"),
        ("sgd", None),
    ],
)
def test_the_best_point_has_every_constant_that_must_move(tmp_path: Path, optimizer: str, said: str | None):
    text = SMALL_SPEC.replace("optimizer: adamw", f"optimizer: {optimizer}").replace(", warmup_steps: 4", "")
    configuration = Configuration(rank=2, alpha=16.0, lr=0.01, init_scale=4.0)
    asked = TrialAsked(trial=0, values={}, configuration=configuration, class_id="c-0")
    rung = RungReported(trial=0, job=0, step=40, metrics={"eval/loss": 0.5, "eval/accuracy": 0.5})
    record = record_with(tmp_path, asked, rung, TrialTold(trial=0, state="finished", value=0.5, reason=""), text=text)
    report = build(record)
    markdown = render(report, "md")
    assert report.best is not None
    assert report.best.default_init.constants.keys() == report.best.constants.keys()
    own_init = next(line for line in markdown.splitlines() if line.startswith("The same run in a trainer"))
    assert (said in own_init) if said else ("eps" not in own_init)
    assert "weight decay" not in own_init


def test_a_distance_is_shown_with_what_a_reader_should_know_beside_it(tmp_path: Path):
    plain = certificate("identical up to rounding")
    (twin,) = plain.twins
    chaotic = twin.model_copy(update={"horizon": 2, "max_ratio": 1.5})
    rescued = twin.model_copy(update={"in_float64": "identical up to rounding", "max_ratio": 7e4})
    spent = twin.model_copy(update={"compared_steps": 1})
    made = plain.model_copy(update={"twins": (chaotic, rescued, spent)})
    assert made.holds
    markdown = render(build(record_with(tmp_path)).model_copy(update={"certificates": (made,)}), "md")
    assert "1.5 (judged to step 1 of 2, where rounding takes over)" in markdown
    assert "(identical up to rounding in float64)" in markdown
    assert "(compared to step 1 of 2, where the loss leaves all bounds)" in markdown


def test_marks_beyond_counting_become_a_picture():
    points = [(Configuration(rank=4, alpha=16.0, lr=1e-3 * n, init_scale=1.0), "pruned", n / 7) for n in range(1, 2002)]
    few, many = (plots.search(some, metric="eval/loss", goal="minimize") for some in (points[:100], points))
    assert few.count("<image") == many.count("<image") - 1  # the colour bar is one too
    assert len(many) < 2 * len(few)
    assert many == plots.search(points, metric="eval/loss", goal="minimize")
