"""What the driver does beside driving: closing what a killed one left open, and refusing before anything is entered."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from sweeps.autoscaling import Growth, NodeType
from sweeps.driver import closing_killed, resume
from sweeps.errors import ClusterError, InputError
from sweeps.events import DriverStarted, Event, JobStarted, SweepCreated, SweepEnded, SweepExtended, TrialAsked
from sweeps.home import Home
from sweeps.interrupts import Interrupts
from sweeps.ledger import Ledger
from sweeps.nodes import Cluster, Node, Resources
from sweeps.plan import Plan, make_plan
from sweeps.planning import plan_for_cluster
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


class Silent:
    """Nobody wants to know how a sweep is getting on."""

    def stage(self, text: str) -> None: ...

    def events(self, sweep: str, events: list[Event]) -> None: ...


def resume_with(home: Home, trials: int | None) -> None:
    """Resumes a sweep on a cluster that cannot be used: whoever is refused there was let through before."""
    resume("begun", home, address="ray://here", progress=Silent(), interrupts=Interrupts(), trials=trials)


def test_trials_that_a_sweep_cannot_be_given_are_refused_before_anything_is_entered(home: Home):
    with Ledger.in_directory(home.path) as ledger:
        begin(home, ledger, "begun")
        before = ledger.read("begun")
        for trials, message in ((24, "must be more than the 24"), (2_000_000, "must be at most 1,000,000")):
            with pytest.raises(InputError, match=message):
                resume_with(home, trials)
        for allowed in (None, 25):
            with pytest.raises(ClusterError, match="Ray Client connections cannot carry a search"):
                resume_with(home, allowed)
        assert ledger.read("begun") == before


def test_the_number_that_an_interrupted_sweep_was_given_may_be_given_again(home: Home):
    with Ledger.in_directory(home.path) as ledger:
        begin(home, ledger, "begun")
        ledger.append("begun", [SweepExtended(trials=32), DriverStarted(resumed=True)])
        for allowed in (None, 32, 40):
            with pytest.raises(ClusterError, match="Ray Client connections cannot carry a search"):
                resume_with(home, allowed)
        with pytest.raises(InputError, match="must be more than the 32 that the sweep has already; found 24"):
            resume_with(home, 24)
        ledger.append("begun", [SweepEnded(state="finished")])
        with pytest.raises(InputError, match="must be more than the 32 that the sweep has already; found 32"):
            resume_with(home, 32)


# -- on a cluster ------------------------------------------------------------------------------------------------------


def planned_on(nodes: int, growth: Growth | None, home: Home, monkeypatch: pytest.MonkeyPatch, **changes: str) -> Plan:
    """The plan for a cluster of machines with one large GPU each, beside a head without any."""
    text = SMALL_SPEC.replace("compute: {workers: 2, pack: 4}", "compute: {workers: auto}")
    for old, new in changes.items():
        text = text.replace(f"{old}: 24", f"{old}: {new}")
    monkeypatch.setattr("sweeps.nodes.worker_bytes", lambda *_: 80 * 10**9)
    head = Node("head", "10.0.0.1", 0.0, 0.0, is_head=True)
    found = Cluster((head, *(Node(f"n{i}", f"10.0.1.{i}", 8.0, 1.0) for i in range(nodes))), growth)
    return plan_for_cluster(
        found, Resources(1.0, 1.0), parse_spec(text, "small.yaml"), home, trials=int(changes["trials"])
    )


UNBOUNDED = Growth((NodeType("gpu", 8.0, 1.0, 4096),), 4096)


@pytest.mark.parametrize(
    ("nodes", "growth", "trials", "workers", "pack"),
    [(3, None, "64", 3, 8), (0, UNBOUNDED, "64", 8, 8), (0, UNBOUNDED, "16", 2, 2), (12, UNBOUNDED, "64", 12, 4)],
)
def test_workers_are_what_there_is_or_what_a_cluster_grows_to_for_them(
    nodes: int,
    growth: Growth | None,
    trials: str,
    workers: int,
    pack: int,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
):
    plan = planned_on(nodes, growth, home, monkeypatch, trials=trials)
    assert (plan.workers, plan.pack) == (workers, pack)
    untried = [warning for warning in plan.warnings if "none is there yet, so it was not tried" in warning]
    assert len(untried) == (1 if nodes == 0 else 0)
