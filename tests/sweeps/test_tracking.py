"""What MLflow shows of a sweep, whatever happens on the way."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sweeps import tracking, tracking_address
from sweeps.errors import TrackingError
from sweeps.events import (
    Delivered,
    DriverStarted,
    JobEnded,
    JobStarted,
    ReportWritten,
    SweepEnded,
    SweepExtended,
    SweepState,
    TrialAsked,
)
from sweeps.ledger import Ledger
from sweeps.space import Configuration
from sweeps.tracking import (
    MlflowWriter,
    Outbox,
    absolute_uri,
    check_tracking,
    default_uri,
    open_command,
    run_url,
)
from tests.support import free_port
from tests.sweeps.mlflow_support import SPEC, Failing, Story, runs_of, seen, server

_FIRST_DELIVERY = """
import sys
from pathlib import Path
from sweeps import tracking, tracking_address
assert "mlflow" not in sys.modules and "torch" not in sys.modules
from sweeps.ledger import Ledger
from tests.sweeps.mlflow_support import Story
here = Path.cwd()
story = Story(Ledger.in_directory(here), "first", tracking.default_uri(here), "first")
story.tell_all()
story.end("finished")
assert tracking.MlflowWriter(story.ledger, "first", tracking.default_uri(here), "first").finish(120)
story.ledger.close()
"""


@pytest.fixture(scope="module")
def first_delivery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A delivery by a fresh process into a directory where MLflow has never been."""
    directory = tmp_path_factory.mktemp("mlflow")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", _FIRST_DELIVERY]
    return directory, subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def uri(first_delivery: tuple[Path, subprocess.CompletedProcess[str]]) -> str:
    """One database for the module: making one takes seconds."""
    return default_uri(first_delivery[0])


@pytest.fixture(scope="module")
def client(uri: str) -> Any:
    return tracking._connect(uri)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.in_directory(tmp_path)
    yield ledger
    ledger.close()


@pytest.fixture
def story(ledger: Ledger, request: pytest.FixtureRequest) -> Story:
    return Story(ledger, f"digits-{request.node.name[-50:]}".replace("'", ""))


# -- what a sweep becomes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "parent"),
    [("finished", "FINISHED"), ("interrupted", "KILLED"), ("paused", "KILLED"), ("failed", "FAILED")],
)
def test_every_run_has_a_true_end(story: Story, uri: str, client: Any, state: SweepState, parent: str) -> None:
    story.tell_all()
    story.end(state)
    Outbox(story.ledger, story.sweep, uri, "ends").deliver()
    runs = seen(client, "ends", story.sweep)
    assert {key: run.status for key, run in runs.items()} == {
        "sweep ": parent,
        "trial 0": "FINISHED",
        "trial 1": "KILLED",
        "trial 2": "FAILED",
        "trial 3": "FAILED",
        "trial 4": "KILLED",
    }
    assert all(run.has_parent for run in runs.values() if run.role == "trial")
    assert all(run.end_ms is not None for run in runs.values())
    assert runs["trial 3"].tags["lora_sweeps.reason"] == "CUDA out of memory"
    assert runs["trial 4"].tags["lora_sweeps.state"] == state


def test_trials_show_what_they_were_and_what_they_reported(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    Outbox(story.ledger, story.sweep, uri, "shows").deliver()
    records = {type(record.event).__name__: record for record in story.ledger.read(story.sweep)}
    runs = seen(client, "shows", story.sweep)
    trial = runs["trial 0"]
    assert trial.name == "r8 lr0.01 init2"
    assert trial.params == {
        "trial": "0",
        "class_id": "c-0",
        "rank": "8",
        "alpha": "16.0",
        "lr": "0.01",
        "init_scale": "2.0",
        "lr_ratio": "1.0",
        "weight_decay": "0.0",
        "optimizer": "adamw",
    }
    # AdamW: alpha x 4 is lr / 2 and init_scale / 2.
    assert trial.tags["lora_sweeps.same_training_as"] == (
        "alpha=4: lr=0.02, init_scale=4\nalpha=64: lr=0.005, init_scale=1"
    )
    assert [(step, value) for step, _, value in trial.metrics["eval/loss"]] == [(50, "1.0"), (100, "0.5")]
    assert [step for step, _, _ in trial.metrics["train/loss"]] == [48, 49, 50, 98, 99, 100]
    assert [(step, value) for step, _, value in trial.metrics["objective"]] == [(100, "0.5")]
    assert trial.end_ms is not None
    assert abs(trial.end_ms / 1000 - records["TrialTold"].at_s) < 0.01
    assert runs["trial 4"].status == "RUNNING"
    assert "objective" not in runs["trial 2"].metrics


def test_parent_shows_the_tokens_a_second_of_every_job_that_counts_them(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    story.append(JobEnded(job=0, train_s=2.0, tokens=3000), JobEnded(job=1, train_s=2.0))
    story.append(JobEnded(job=2, train_s=4.0, tokens=10_000))
    Outbox(story.ledger, story.sweep, uri, "tokens").deliver()
    runs = seen(client, "tokens", story.sweep)
    points = runs["sweep "].metrics["train/tokens_per_s"]
    assert [(step, value) for step, _, value in points] == [(0, "1500.0"), (2, "2500.0")]
    assert not any("train/tokens_per_s" in run.metrics for key, run in runs.items() if key != "sweep ")


def test_parent_describes_the_sweep(story: Story, uri: str, client: Any, tmp_path: Path) -> None:
    story.tell_all()
    story.end("finished")
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text("# digits")
    story.append(ReportWritten(directory=str(report)))
    Outbox(story.ledger, story.sweep, uri, "described").deliver()
    parent = seen(client, "described", story.sweep)["sweep "]
    assert parent.name == story.sweep
    expected = {"optimizer": "adamw", "method": "gp", "task": "digits", "alpha_reference": "16", "eliminated": "alpha"}
    assert parent.params.items() >= expected.items()
    assert (parent.tags["lora_sweeps.best_trial"], parent.tags["lora_sweeps.best_rank"]) == ("0", "8")
    assert [value for _, _, value in parent.metrics["best_value"]] == ["0.5"]
    note = parent.tags["mlflow.note.content"]
    assert "| 0 | 8 | 16 | 0.01 | 2 | 0.5 | 0.5 |" in note
    assert "eval/loss (nats)" in note
    assert "Trials: 1 finished, 1 pruned, 1 diverged, 1 failed, 1 waiting." in note
    assert "alpha is a gauge" in note
    (run,) = [run for run in runs_of(client, "described", story.sweep) if run.info.run_name == story.sweep]
    directory = Path(urllib.request.url2pathname(urllib.parse.urlparse(run.info.artifact_uri).path))
    assert (directory / "spec.yaml").read_text() == SPEC
    assert (directory / "report" / "report.md").read_text() == "# digits"
    assert {path.name for path in directory.iterdir()} == {"spec.yaml", "spec.resolved.json", "plan.json", "report"}
    assert directory.is_relative_to(Path(absolute_uri(uri).removeprefix("sqlite:///")).parent)


def test_the_best_trials_show_every_dimension_that_is_searched(story: Story, uri: str, client: Any) -> None:
    story.spec_text = SPEC.replace(
        "  alpha:", "  lr_ratio: {values: [1, 16]}\n  weight_decay: {values: [0, 0.01]}\n  alpha:"
    )
    story.begin()
    point = Configuration(rank=8, alpha=16.0, lr=0.01, init_scale=2.0, lr_ratio=16.0, weight_decay=0.01)
    story.append(TrialAsked(trial=0, values={}, configuration=point, class_id="c-0"))
    story.run(0)
    story.report(0, 100, 0.5)
    story.tell(0, "finished", 0.5)
    story.end("finished")
    Outbox(story.ledger, story.sweep, uri, "dimensions").deliver()
    runs = seen(client, "dimensions", story.sweep)
    tags, params = runs["sweep "].tags, runs["trial 0"].params
    for name in ("rank", "alpha", "lr", "init_scale", "lr_ratio", "weight_decay"):
        assert tags[f"lora_sweeps.best_{name}"] == params[name] == str(getattr(point, name))
    note = tags["mlflow.note.content"]
    assert "| trial | rank | alpha | lr | init_scale | lr_ratio | weight_decay | eval/loss (nats) |" in note
    assert "| 0 | 8 | 16 | 0.01 | 2 | 16 | 0.01 | 0.5 |" in note


def test_duplicates_and_trials_never_started_have_no_run(story: Story, uri: str, client: Any) -> None:
    story.begin()
    story.ask(0)
    story.ask(1, duplicate_of=0)
    story.ask(2)
    story.run(0)
    story.tell(1, "finished", 1.0)
    Outbox(story.ledger, story.sweep, uri, "duplicates").deliver()
    assert set(seen(client, "duplicates", story.sweep)) == {"sweep ", "trial 0"}


def test_an_extended_sweep_says_how_many_trials_it_trains_and_goes_on_in_the_same_runs(
    story: Story, uri: str, client: Any
) -> None:
    def deliver() -> Path:
        Outbox(story.ledger, story.sweep, uri, "extended").deliver()
        (run,) = [run for run in runs_of(client, "extended", story.sweep) if run.info.run_name == story.sweep]
        return Path(urllib.request.url2pathname(urllib.parse.urlparse(run.info.artifact_uri).path))

    story.tell_all()
    story.end("finished")
    directory = deliver()
    parent = seen(client, "extended", story.sweep)["sweep "]
    assert (parent.status, parent.tags["lora_sweeps.trials"]) == ("FINISHED", "64")
    assert "trials" not in parent.params  # MLflow would not let it change
    assert json.loads((directory / "plan.json").read_text())["trials"] == 64

    story.append(SweepExtended(trials=80), DriverStarted(resumed=True))
    assert deliver() == directory
    parent = seen(client, "extended", story.sweep)["sweep "]
    assert (parent.status, parent.tags["lora_sweeps.trials"]) == ("RUNNING", "80")
    plan = json.loads((directory / "plan.json").read_text())
    assert (plan["trials"], plan["certificates"]) == (80, 4)

    story.ask(5)
    story.run(5)
    story.report(5, 100, 0.125)
    story.tell(5, "finished", 0.125)
    story.end("finished")
    deliver()
    runs = seen(client, "extended", story.sweep)
    assert (runs["sweep "].status, runs["trial 5"].status, len(runs)) == ("FINISHED", "FINISHED", 7)
    assert runs["sweep "].tags["lora_sweeps.best_trial"] == "5"
    (parent_run,) = [run for run in runs_of(client, "extended", story.sweep) if run.info.run_name == story.sweep]
    assert parent_run.data.metrics["trials/finished"] == 2  # the latest count, not the first


def test_twins_are_children_with_their_verdict(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    story.append(JobStarted(job=9, work="certify", trials=(0,), start=0, stop=3))
    story.certify(0, ["bit-identical", "different"])
    story.end("finished")
    Outbox(story.ledger, story.sweep, uri, "twins").deliver()
    runs = seen(client, "twins", story.sweep)
    twins = sorted(
        (run for run in runs.values() if run.role == "twin"), key=lambda run: run.params["alpha"], reverse=True
    )
    assert [run.name for run in twins] == [
        "twin of r8 lr0.01 init2 at alpha=64",
        "twin of r8 lr0.01 init2 at alpha=4",
    ]
    assert [run.tags["lora_sweeps.verdict"] for run in twins] == ["different", "bit-identical"]
    assert twins[0].tags["lora_sweeps.first_step"] == "2"
    assert twins[0].params["alpha"] == "64.0"
    assert all(run.status == "FINISHED" and run.has_parent for run in twins)
    assert [(step, value) for step, _, value in twins[0].metrics["train/loss"]] == [(1, "2.0"), (2, "1.5"), (3, "1.2")]
    assert runs["trial 0"].status == "FINISHED"


def test_values_that_are_not_finite_are_told_as_they_are(story: Story, uri: str, client: Any) -> None:
    story.begin()
    story.ask(0, 1)
    story.run(0, 1)
    story.report(0, 50, float("nan"), points=0)
    story.report(1, 50, float("inf"), points=0)
    Outbox(story.ledger, story.sweep, uri, "infinite").deliver()
    runs = seen(client, "infinite", story.sweep)
    assert [value for _, _, value in runs["trial 0"].metrics["eval/loss"]] == ["nan"]
    assert "eval/loss" not in runs["trial 1"].metrics
    assert runs["trial 1"].tags["lora_sweeps.infinite.eval/loss"] == "inf at step 50"


# -- resuming, crashes -------------------------------------------------------------------------------------------------


def test_a_resumed_sweep_goes_on_in_the_same_runs(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    story.end("interrupted")
    Outbox(story.ledger, story.sweep, uri, "resumed").deliver()
    ids = {run.info.run_id for run in runs_of(client, "resumed", story.sweep)}
    story.append(DriverStarted(resumed=True), JobStarted(job=1, trials=(4,), start=0, stop=50))
    Outbox(story.ledger, story.sweep, uri, "resumed").deliver()
    runs = seen(client, "resumed", story.sweep)
    assert (runs["sweep "].status, runs["trial 4"].status, runs["trial 1"].status) == ("RUNNING", "RUNNING", "KILLED")
    story.report(4, 100, 0.25)
    story.tell(4, "finished", 0.25)
    story.end("finished")
    Outbox(story.ledger, story.sweep, uri, "resumed").deliver()
    runs = seen(client, "resumed", story.sweep)
    assert (runs["sweep "].status, runs["trial 4"].status) == ("FINISHED", "FINISHED")
    assert runs["sweep "].tags["lora_sweeps.best_trial"] == "4"
    assert runs["trial 4"].tags["lora_sweeps.reason"] == ""
    assert {run.info.run_id for run in runs_of(client, "resumed", story.sweep)} == ids


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_crash_between_any_two_requests_changes_nothing(
    ledger: Ledger, uri: str, client: Any, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    experiment = f"crashes-{carried_out}"

    def tell(sweep: str) -> Story:
        story = Story(ledger, sweep)
        story.begin()
        story.ask(0)
        story.run(0)
        story.report(0, 50, 1.0)
        story.tell(0, "finished", 1.0)
        story.certify(0, ["bit-identical"])
        return story

    def shape(sweep: str) -> list[Any]:
        return sorted(
            (
                (
                    key.split(".")[-1],
                    run.name.replace(sweep, ""),
                    (run.status, run.has_parent, run.params, run.tags.get("lora_sweeps.artifacts")),
                    {metric: [(step, value) for step, _, value in points] for metric, points in run.metrics.items()},
                )
                for key, run in seen(client, experiment, sweep).items()
            ),
            key=lambda run: run[:2],
        )

    def artifacts(sweep: str) -> set[str]:
        (parent,) = [r for r in runs_of(client, experiment, sweep) if r.data.tags["lora_sweeps.role"] == "sweep"]
        return {file.path for file in client.list_artifacts(parent.info.run_id)}

    whole = tell("whole")
    Outbox(whole.ledger, "whole", uri, experiment).deliver()
    expected = shape("whole")
    connect: Callable[[str], Any] = tracking._connect
    for n in range(1, 100):
        broken = Failing(client, n, carried_out=carried_out)
        story = tell(f"broken-{n}")
        monkeypatch.setattr(tracking, "_connect", lambda uri, broken=broken: broken)
        if n < 4:
            with pytest.raises(ConnectionError, match="the connection broke"):
                Outbox(story.ledger, story.sweep, uri, experiment).deliver()
        else:
            try:
                Outbox(story.ledger, story.sweep, uri, experiment).deliver()
            except ConnectionError:
                # Once it is entered, only files can be missing, and the parent says so.
                if any(isinstance(record.event, Delivered) for record in story.ledger.read(story.sweep)):
                    assert broken.last_method in ("log_artifacts", "set_tag")
        monkeypatch.setattr(tracking, "_connect", connect)
        if not broken.failed:
            break
        Outbox(story.ledger, story.sweep, uri, experiment).deliver()
        assert shape(story.sweep) == expected, f"request {n} failed"
        assert artifacts(story.sweep) == {"spec.yaml", "spec.resolved.json", "plan.json"}, f"request {n} failed"
    assert 9 < n < 99


def test_a_crash_before_delivered_is_entered_repeats_nothing(
    story: Story, uri: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.tell_all()
    story.end("interrupted")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", fail)
        with pytest.raises(OSError, match="no space left"):
            Outbox(story.ledger, story.sweep, uri, "entered").deliver()
    before = seen(client, "entered", story.sweep)
    assert before["sweep "].tags["lora_sweeps.artifacts"] == "waiting"
    before["sweep "].tags["lora_sweeps.artifacts"] = "delivered"
    Outbox(story.ledger, story.sweep, uri, "entered").deliver()
    assert seen(client, "entered", story.sweep) == before
    delivered = [record.event for record in story.ledger.read(story.sweep) if isinstance(record.event, Delivered)]
    assert [sorted(event.trial_run_ids) for event in delivered] == [[0, 1, 2, 3, 4]]
    Outbox(story.ledger, story.sweep, uri, "entered").deliver()
    assert len([r for r in story.ledger.read(story.sweep) if isinstance(r.event, Delivered)]) == 1


def test_a_run_that_was_made_twice_is_put_away(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    Outbox(story.ledger, story.sweep, uri, "twice").deliver()
    (first,) = [run for run in runs_of(client, "twice", story.sweep) if run.data.tags["lora_sweeps.run"] == "4"]
    client.create_run(first.info.experiment_id, tags=first.data.tags, start_time=0)
    story.end("paused")
    Outbox(story.ledger, story.sweep, uri, "twice").deliver()
    runs = runs_of(client, "twice", story.sweep)
    assert [run.info.run_id for run in runs if run.data.tags["lora_sweeps.run"] == "4"] == [first.info.run_id]
    assert seen(client, "twice", story.sweep)["trial 4"].status == "KILLED"


def test_what_disappeared_from_mlflow_is_delivered_again(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    Outbox(story.ledger, story.sweep, uri, "again").deliver()
    before = seen(client, "again", story.sweep)
    for run in runs_of(client, "again", story.sweep):
        if run.data.tags["lora_sweeps.run"] in ("", "0"):
            client.delete_run(run.info.run_id)
    story.append(JobStarted(job=9, trials=(4,), start=50, stop=100))
    Outbox(story.ledger, story.sweep, uri, "again").deliver()
    assert seen(client, "again", story.sweep) == before


def test_a_deleted_experiment_is_named_with_the_way_out(story: Story, uri: str, client: Any) -> None:
    story.tell_all()
    experiment_id = client.create_experiment("gone")
    client.delete_experiment(experiment_id)
    for refused in (
        lambda: Outbox(story.ledger, story.sweep, uri, "gone").deliver(),
        lambda: check_tracking(uri, "gone"),
    ):
        with pytest.raises(TrackingError, match=f"'gone' is deleted.*mlflow experiments restore -x {experiment_id}"):
            refused()
    client.restore_experiment(experiment_id)
    check_tracking(uri, "gone")
    Outbox(story.ledger, story.sweep, uri, "gone").deliver()
    assert len(seen(client, "gone", story.sweep)) == 6


# -- the writer --------------------------------------------------------------------------------------------------------


def test_writer_delivers_while_the_sweep_goes_on(story: Story, uri: str, client: Any) -> None:
    story.begin()
    writer = MlflowWriter(story.ledger, story.sweep, uri, "live")
    writer.start()
    story.ask(0)
    story.run(0)
    writer.wake()
    _until(lambda: "0" in {run.data.tags["lora_sweeps.run"] for run in runs_of(client, "live", story.sweep)})
    story.report(0, 50, 1.0)
    story.tell(0, "finished", 1.0)
    story.end("finished")
    assert writer.finish(120)
    assert writer.last_error is None
    runs = seen(client, "live", story.sweep)
    assert {run.status for run in runs.values()} == {"FINISHED"}
    last = story.ledger.read(story.sweep)[-1].event
    assert isinstance(last, Delivered)
    assert last.up_to == story.ledger.read(story.sweep)[-2].seq
    delivered = [record.event for record in story.ledger.read(story.sweep) if isinstance(record.event, Delivered)]
    assert [trial for event in delivered for trial in event.trial_run_ids] == [0]


def test_writer_outlives_a_server_that_goes_away_and_comes_back(ledger: Ledger, uri: str, client: Any) -> None:
    database, port = Path(absolute_uri(uri).removeprefix("sqlite:///")), free_port()
    address = f"http://127.0.0.1:{port}"
    story = Story(ledger, "away")
    story.begin()
    story.ask(0, 1)
    story.run(0, 1)
    writer = MlflowWriter(story.ledger, story.sweep, address, "away")
    with server(database, port):
        check_tracking(address, "away")
        writer.start()
        _until(lambda: any(isinstance(r.event, Delivered) for r in story.ledger.read(story.sweep)))
    story.report(0, 50, 1.0, points=2500)
    for step in range(51, 100):
        story.report(1, step, 1.0)
        writer.wake()
    _until(lambda: writer.last_error is not None)
    left = MlflowWriter(story.ledger, story.sweep, address, "away")
    left.start()
    _until(lambda: left.last_error is not None)
    assert not left.finish(0)
    assert left.last_error is not None
    assert f"port={port}" in left.last_error
    story.tell(0, "finished", 1.0)
    story.tell(1, "pruned", 1.0)
    story.end("finished")
    with server(database, port):
        assert writer.finish(120)
        # The page that people see, and the files behind it, which the direct route wrote as well as the server's.
        runs = seen(client, "away", story.sweep)
        (parent,) = [
            run for run in runs_of(client, "away", story.sweep) if run.data.tags["lora_sweeps.role"] == "sweep"
        ]
        query = f"get-artifact?path=spec.yaml&run_uuid={parent.info.run_id}"
        with urllib.request.urlopen(f"{address}/{query}", timeout=60) as response:
            assert response.read().decode() == SPEC
    assert {key: run.status for key, run in runs.items()} == {
        "sweep ": "FINISHED",
        "trial 0": "FINISHED",
        "trial 1": "KILLED",
    }
    assert len(runs["trial 0"].metrics["train/loss"]) == 2500
    assert [step for step, _, _ in runs["trial 1"].metrics["eval/loss"]] == list(range(51, 100))


def test_a_refusal_ends_finish_early(story: Story, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    story.tell_all()

    attempts = []

    def refuse(uri: str) -> Any:
        attempts.append(uri)
        raise TrackingError("you shall not pass")

    monkeypatch.setattr(tracking, "_connect", refuse)
    writer = MlflowWriter(story.ledger, story.sweep, uri, "refused")
    assert not writer.finish(600)
    assert writer.last_error == "you shall not pass"
    assert len(attempts) <= 3  # and not one every 0.5 s, for as long as it may take


def test_nobody_waits_for_a_call_that_never_returns(story: Story, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, released = threading.Event(), threading.Event()

    def hang(uri: str) -> Any:
        entered.set()
        released.wait()
        raise TrackingError("released")

    monkeypatch.setattr(tracking, "_connect", hang)
    story.tell_all()
    writer = MlflowWriter(story.ledger, story.sweep, uri, "hangs")
    writer.start()
    assert entered.wait(60)

    def drive() -> None:
        writer.wake()
        assert not writer.finish(0.1)

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    driver.join(60)
    assert not driver.is_alive(), "wake or finish waits for MLflow"
    assert not released.is_set()
    assert writer.last_error == "MLflow did not take everything within 0.1 s"
    released.set()
    assert writer._thread is not None
    writer._thread.join(60)


def test_every_request_is_bounded(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracking._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    tracking._connect("http://127.0.0.1:1")
    # What `mlflow.environment_variables` reads: one attempt, of seconds.
    assert (os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) == ("10", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    story.begin()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Exception, match="timed out"):
            Outbox(story.ledger, story.sweep, address, "silent").deliver()
        monkeypatch.setattr(tracking_address, "_PROBE_TIMEOUT_S", 0.2)
        with pytest.raises(TrackingError, match=r"does not answer: .*timed out"):
            check_tracking(address, "silent")


def test_an_artifact_store_that_refuses_does_not_hold_up_metrics(
    story: Story, uri: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("No module named 'boto3'")

    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text("# digits")
    story.tell_all()
    story.append(ReportWritten(directory=str(report)))
    story.end("finished")
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.tracking.MlflowClient.log_artifacts", refuse)
        writer = MlflowWriter(story.ledger, story.sweep, uri, "artifacts")
        assert not writer.finish(120)
        assert writer.last_error is not None
        assert "no artifacts" in writer.last_error
        assert "boto3" in writer.last_error
    runs = seen(client, "artifacts", story.sweep)
    assert (runs["sweep "].status, runs["trial 0"].metrics["objective"][0][2]) == ("FINISHED", "0.5")
    assert "boto3" in runs["sweep "].tags["lora_sweeps.artifacts"]
    # A resume has nothing to tell MLflow of but what the store refused.
    last = story.ledger.read(story.sweep)[-1]
    assert isinstance(last.event, Delivered)
    again = MlflowWriter(story.ledger, story.sweep, uri, "artifacts")
    assert again.finish(120), again.last_error
    assert story.ledger.read(story.sweep)[-1] == last
    (parent,) = [r for r in runs_of(client, "artifacts", story.sweep) if r.data.tags["lora_sweeps.role"] == "sweep"]
    assert parent.data.tags["lora_sweeps.artifacts"] == "delivered"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "spec.yaml",
        "spec.resolved.json",
        "plan.json",
        "report",
    }
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "report")] == ["report/report.md"]


def test_refused_artifacts_are_tried_again_with_the_next(
    story: Story, uri: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    story.begin()
    outbox = Outbox(story.ledger, story.sweep, uri, "next")
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.tracking.MlflowClient.log_artifacts", refuse)
        outbox.deliver()
    assert outbox.note is not None
    story.append(ReportWritten(directory=str(tmp_path)))
    outbox.deliver()
    assert outbox.note is None
    (parent,) = runs_of(client, "next", story.sweep)
    assert "spec.yaml" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_an_artifact_store_that_is_away_does_not_hold_up_metrics(
    story: Story, uri: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the store is away")

    story.tell_all()
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.tracking.MlflowClient.log_artifacts", fail)
        with pytest.raises(ConnectionError, match="the store is away"):
            Outbox(story.ledger, story.sweep, uri, "store away").deliver()
    runs = seen(client, "store away", story.sweep)
    assert runs["trial 0"].metrics["objective"][0][2] == "0.5"
    assert runs["sweep "].tags["lora_sweeps.artifacts"] == "waiting"
    Outbox(story.ledger, story.sweep, uri, "store away").deliver()
    assert seen(client, "store away", story.sweep)["sweep "].tags["lora_sweeps.artifacts"] == "delivered"


def test_importing_is_light_and_delivering_is_silent(
    first_delivery: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, done = first_delivery
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in directory.iterdir()} >= {"ledger.db", "mlflow.db", "mlartifacts"}
    assert not (directory / "mlruns").exists()


# -- where MLflow is ---------------------------------------------------------------------------------------------------


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = int(self.path.split("/")[1])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def other_server() -> Iterator[str]:
    """A server that is not MLflow; it answers with the status that its path begins with."""
    answering = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{answering.server_address[1]}"
    answering.shutdown()
    answering.server_close()


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("file:///tmp/mlruns", r"found 'file:///tmp/mlruns', a directory of files.*use sqlite:///"),
        ("./mlruns", "a directory of files"),
        ("ftp://host/x", r"must be sqlite:///PATH.*found 'ftp://host/x'"),
        ("databricks://profile", "must be sqlite:///PATH"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite://", "in memory"),
        ("sqlite:///{tmp}/nowhere/mlflow.db", r"nowhere does not exist; make it with"),
        ("sqlite:///{tmp}", "is a directory; use sqlite:///"),
        ("sqlite:///{tmp}/text.db", "text.db cannot be read as one: file is not a database"),
        ("http://127.0.0.1:{port}", r"127.0.0.1:\d+ does not answer: .*refused.*start it"),
        ("http://nowhere.invalid", "does not answer"),
        ("http://127.0.0.1:what", "must be sqlite:///PATH"),
        ("http://{server}/401", r"lets us in; .* refuses \(HTTP 401\).*MLFLOW_TRACKING_USERNAME"),
        ("http://{server}/403", r"refuses \(HTTP 403\).*--allowed-hosts"),
        ("http://{server}/404", "answers HTTP 404, but not as MLflow does"),
        ("http://{server}/200", "answers HTTP 200, but not as MLflow does"),
        ("postgresql://user@127.0.0.1:{port}/mlflow", "database that can be reached"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_nothing_is_made(
    uri: str, match: str, tmp_path: Path, other_server: str
) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TrackingError, match=match):
        check_tracking(uri.format(tmp=tmp_path, port=free_port(), server=other_server), "digits")
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(TrackingError, match=f"{tmp_path} cannot be written"):
        check_tracking(default_uri(tmp_path))


def test_a_database_of_another_mlflow_is_refused_with_the_way_out(tmp_path: Path, uri: str) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(absolute_uri(uri).removeprefix("sqlite:///"), path)
    check_tracking(default_uri(tmp_path))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0a8213491aaa'")
    with pytest.raises(TrackingError, match=f"is of another; back it up, then `mlflow db upgrade sqlite:///{path}`"):
        check_tracking(default_uri(tmp_path))


def test_a_usable_address_passes_and_nothing_is_made(tmp_path: Path, uri: str) -> None:
    check_tracking(default_uri(tmp_path), "digits")
    assert list(tmp_path.iterdir()) == []
    check_tracking(uri, "digits")


@pytest.mark.parametrize(
    "secret_uri",
    [
        "http://ann:s3cret@127.0.0.1:{port}",
        "http://s3cret@127.0.0.1:{port}",
        "http://127.0.0.1:{port}/?token=s3cret",
        "postgresql://ann:s3cret@127.0.0.1:{port}/mlflow",
        "postgresql://127.0.0.1:{port}/mlflow?user=ann&password=s3cret",
        "ftp://ann:s3cret@host",
        "ftp://s3cret@host",
    ],
)
def test_passwords_are_never_shown(secret_uri: str, story: Story) -> None:
    uri = secret_uri.format(port=free_port())
    story.begin()
    writer = MlflowWriter(story.ledger, story.sweep, uri, "secret")
    with pytest.raises(TrackingError) as refused:
        check_tracking(uri)
    if uri.startswith("http"):
        writer.start()
        _until(lambda: writer.last_error is not None)
        writer.finish(0)
    shown = [str(refused.value), str(writer.last_error), open_command(uri), run_url(uri, "1", "abc")]
    assert "s3cret" not in " ".join(shown)


def test_passwords_do_not_reach_mlflow(story: Story, uri: str, client: Any) -> None:
    story.spec_text = f"# postgresql://ann:s3c/ret@host/db\n{SPEC}"
    story.begin()
    story.ask(0)
    story.run(0)
    story.tell(0, "failed", reason="cannot open https://s3cret@host/model")
    reason = "x" * 4880 + " postgresql://ann:s3cret@host/db?password=s3cret"
    story.append(SweepEnded(state="paused", reason=reason))
    Outbox(story.ledger, story.sweep, uri, "secrets").deliver()
    runs = seen(client, "secrets", story.sweep)
    assert runs["trial 0"].tags["lora_sweeps.reason"] == "cannot open https://***@host/model"
    assert "s3cret" not in repr(runs)
    (run,) = [run for run in runs_of(client, "secrets", story.sweep) if run.data.tags["lora_sweeps.role"] == "sweep"]
    directory = Path(urllib.request.url2pathname(urllib.parse.urlparse(run.info.artifact_uri).path))
    assert (directory / "spec.yaml").read_text() == f"# postgresql://ann:***@host/db\n{SPEC}"


def test_addresses_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///mlflow.db") == default_uri(tmp_path)
    assert open_command("sqlite:///mlflow.db") == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    assert open_command("sqlite:////a b/m.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    assert open_command("https://ann:x@host/mlflow/") == "https://host/mlflow"
    assert run_url("https://ann:x@host/mlflow/", "7", "abc") == "https://host/mlflow/#/experiments/7/runs/abc"
    assert run_url(default_uri(tmp_path), "7", "abc") == "http://127.0.0.1:5000/#/experiments/7/runs/abc"


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited 60 s in vain"
        time.sleep(0.05)
