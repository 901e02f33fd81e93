"""What the driver does beside driving: closing what a killed one left open."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeps.driver import closing_killed
from sweeps.events import DriverStarted, JobStarted, SweepCreated, TrialAsked
from sweeps.home import Home
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.records import read_sweep
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import parse_spec
from sweeps.tracking import MlflowWriter, default_uri
from tests.support import SMALL_SPEC


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(tmp_path / "state"))
    return Home.open()


def begin(home: Home, ledger: Ledger, sweep: str) -> None:
    """A sweep whose driver has begun a job and said nothing since; MLflow has it as running."""
    spec = parse_spec(SMALL_SPEC, "small.yaml").spec
    plan = make_plan(spec, Reduction.of(spec), workers=2, most_members=64)
    created = SweepCreated(
        name="small",
        spec=spec.model_dump(mode="json"),
        spec_text=SMALL_SPEC,
        source="small.yaml",
        plan=plan.model_dump(mode="json"),
        tracking_uri=default_uri(home.path),
        experiment="small",
        lanes=3,
        pack=4,
    )
    asked = TrialAsked(trial=0, values={}, configuration=Configuration(2, 16.0, 0.01), class_id="c-0")
    ledger.create(sweep, created)
    ledger.append(sweep, [DriverStarted(resumed=False), asked, JobStarted(job=0, trials=(0,), start=0, stop=10)])
    writer = MlflowWriter(ledger, sweep, created.tracking_uri, "small")
    writer.start()
    assert writer.finish(60)


def statuses(home: Home, sweep: str) -> set[str]:
    client = MlflowClient(tracking_uri=default_uri(home.path))
    (experiment,) = [found for found in client.search_experiments() if found.name == "small"]
    runs = client.search_runs([experiment.experiment_id], f"tags.`lora_sweeps.sweep_id` = '{sweep}'")
    assert len(runs) == 2
    return {run.info.status for run in runs}


def test_what_a_killed_driver_left_open_is_closed_and_what_is_driven_is_left_alone(home: Home):
    ledger = Ledger.in_directory(home.path)
    for sweep in ("killed", "driven", "resumed"):
        begin(home, ledger, sweep)
        assert statuses(home, sweep) == {"RUNNING"}
    with home.driving("driven"), closing_killed(home, ledger, spare="resumed"):
        pass
    assert read_sweep(ledger, "killed").state == "interrupted"
    assert read_sweep(ledger, "driven").state == read_sweep(ledger, "resumed").state == "running"
    assert statuses(home, "killed") == {"KILLED"}
    assert statuses(home, "driven") == statuses(home, "resumed") == {"RUNNING"}
    assert set(ledger.open_sweeps()) == {"driven", "resumed"}
