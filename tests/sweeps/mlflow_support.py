"""A small sweep to tell MLflow of, what MLflow then knows of it, and a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeps.events import (
    Certified,
    DriverStarted,
    Event,
    JobStarted,
    RungReported,
    SweepCreated,
    SweepEnded,
    SweepState,
    TrialAsked,
    TrialState,
    TrialTold,
)
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import parse_spec

SPEC = """\
name: digits
task: {type: digits}
lora: {target_modules: [fc1]}
parameters:
  rank: {values: [2, 4, 8]}
  lr: {min: 1e-4, max: 1e-1}
  init_scale: {min: 0.25, max: 4}
  alpha: {values: [4, 16, 64]}
train: {optimizer: adamw, steps: 100}
"""


@dataclass
class Story:
    """A sweep's events, appended as a driver would."""

    ledger: Ledger
    sweep: str
    uri: str = ""
    experiment: str = ""
    spec_text: str = SPEC
    jobs: int = field(default=0, init=False)

    def begin(self) -> None:
        spec = parse_spec(self.spec_text, "digits.yaml").spec
        plan = make_plan(spec, Reduction.of(spec), workers=1, most_members=4)
        created = SweepCreated(
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            spec_text=self.spec_text,
            source="digits.yaml",
            plan=plan.model_dump(mode="json"),
            tracking_uri=self.uri,
            experiment=self.experiment,
            lanes=1,
            pack=4,
        )
        self.ledger.create(self.sweep, created)
        self.append(DriverStarted(resumed=False))

    def append(self, *events: Event) -> None:
        self.ledger.append(self.sweep, events)

    def ask(self, *trials: int, duplicate_of: int | None = None) -> None:
        for trial in trials:
            configuration = Configuration(rank=8, alpha=16.0, lr=0.01 * (trial + 1), init_scale=2.0)
            self.append(
                TrialAsked(
                    trial=trial,
                    values={"lr": configuration.lr},
                    configuration=configuration,
                    class_id=f"c-{trial}",
                    duplicate_of=duplicate_of,
                )
            )

    def run(self, *trials: int) -> None:
        self.append(JobStarted(job=self.jobs, trials=trials, start=0, stop=50))
        self.jobs += 1

    def report(self, trial: int, step: int, loss: float, *, points: int = 3) -> None:
        losses = tuple((step - points + 1 + i, loss + 0.1 * (points - i)) for i in range(points))
        metrics = {"eval/loss": loss, "eval/accuracy": 0.5}
        self.append(RungReported(trial=trial, job=0, step=step, metrics=metrics, train_losses=losses))

    def tell(self, trial: int, state: TrialState, value: float | None = None, reason: str = "") -> None:
        self.append(TrialTold(trial=trial, state=state, value=value, reason=reason))

    def end(self, state: SweepState) -> None:
        self.append(SweepEnded(state=state))

    def certify(self, trial: int, verdicts: list[str]) -> None:
        twins = [
            {
                "configuration": {"rank": 8, "alpha": alpha, "lr": 0.005, "init_scale": 1.0},
                "exact_in_binary": True,
                "verdict": verdict,
                "first_step": 2 if verdict == "different" else None,
                "max_ratio": 0.0,
                "losses": [2.0, 1.5, 1.2],
                "update_norms": {"fc1": [0.0, 0.1, 0.2]},
            }
            for alpha, verdict in zip((4.0, 64.0), verdicts, strict=False)
        ]
        certificate = {
            "class_id": f"c-{trial}",
            "trial": trial,
            "steps": 3,
            "representative": {"rank": 8, "alpha": 16.0, "lr": 0.01, "init_scale": 2.0},
            "losses": [2.0, 1.5, 1.2],
            "update_norms": {"fc1": [0.0, 0.1, 0.2]},
            "controls": 4,
            "twins": twins,
        }
        self.append(Certified(certificate=certificate))

    def tell_all(self) -> None:
        """A sweep with a trial of each kind, not ended yet: 0 finished, 1 pruned, 2 diverged, 3 failed, 4 under way."""
        self.begin()
        self.ask(0, 1, 2, 3)
        self.run(0, 1, 2, 3)
        self.report(0, 50, 1.0)
        self.report(1, 50, 3.0)
        self.tell(1, "pruned", 3.0, "successive_halving at step 50")
        self.tell(2, "diverged", reason="the loss was not finite at step 7")
        self.tell(3, "failed", reason="CUDA out of memory")
        self.report(0, 100, 0.5)
        self.tell(0, "finished", 0.5)
        self.ask(4)
        self.run(4)


@dataclass(frozen=True)
class SeenRun:
    """A run as MLflow shows it, without what differs from one delivery to another."""

    name: str
    role: str
    status: str
    start_ms: int
    end_ms: int | None
    has_parent: bool
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[int, int, str]]]
    """(step, timestamp, value), in order."""


def runs_of(client: Any, experiment: str, sweep: str) -> list[Any]:
    """Every run of a sweep."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    return list(client.search_runs([found.experiment_id], f"tags.`lora_sweeps.sweep_id` = '{sweep}'"))


def seen(client: Any, experiment: str, sweep: str) -> dict[str, SeenRun]:
    """What MLflow knows of a sweep, by role and name; fails if anything is there twice."""
    runs = runs_of(client, experiment, sweep)
    parents = {run.info.run_id for run in runs if run.data.tags["lora_sweeps.role"] == "sweep"}
    assert len(parents) == 1, "a sweep has one parent run"
    shown: dict[str, SeenRun] = {}
    for run in runs:
        tags = dict(run.data.tags)
        key = f"{tags['lora_sweeps.role']} {tags['lora_sweeps.run']}"
        assert key not in shown, f"{key} was made twice"
        histories = {metric: client.get_metric_history(run.info.run_id, metric) for metric in run.data.metrics}
        shown[key] = SeenRun(
            name=run.info.run_name,
            role=tags["lora_sweeps.role"],
            status=run.info.status,
            start_ms=run.info.start_time,
            end_ms=run.info.end_time,
            has_parent=tags.pop("mlflow.parentRunId", None) in parents,
            params=dict(run.data.params),
            tags=tags,
            metrics={
                metric: sorted((point.step, point.timestamp, str(point.value)) for point in history)
                for metric, history in histories.items()
            },
        )
    return shown


class Failing:
    """A client whose n-th request fails, before it was carried out or after."""

    def __init__(self, client: Any, n: int, *, carried_out: bool) -> None:
        self._client, self._left, self._carried_out = client, n, carried_out
        self.failed = False
        self.last_method = ""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            self.last_method = name
            if self._left != 0:
                return method(*args, **kwargs)
            self.failed = True
            if self._carried_out:
                method(*args, **kwargs)
            raise ConnectionError("the connection broke")

        return call


@contextmanager
def server(database: Path, port: int) -> Iterator[str]:
    """A real MLflow server on a SQLite file; yields its address."""
    with server_of(f"sqlite:///{database}", port, str(database.parent / "served"), cwd=database.parent) as address:
        yield address


@contextmanager
def server_of(store: str, port: int, artifacts: str, *options: str, cwd: Path, **environ: str) -> Iterator[str]:
    """A real MLflow server on any store, which passes artifacts on to wherever they go; yields its address."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", artifacts, *options]
    # Its job runner would be six more processes, which nothing here needs.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | quiet | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, f"mlflow server ended with {process.returncode}"
        with (
            suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(f"{address}/health"),
        ):
            return
        time.sleep(0.2)
    raise AssertionError("mlflow server did not start within 300 s")
