"""A service whose queue stands still, so that a test alone says what happens to a sweep and when; and sweeps for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from services.api import make_app
from services.auth import Scope, make_token
from services.planning import Planner
from services.queue import Rules
from services.reading import Records
from services.runner import LocalRunner
from services.service import Service
from services.settings import Settings
from services.store import AuditEntry, Store, Submission
from services.streaming import Hub
from services.supervisor import Policy, Supervisor
from sweeps.events import (
    Certified,
    DriverStarted,
    Event,
    JobEnded,
    JobStarted,
    QueueState,
    RungReported,
    SweepCreated,
    SweepEnded,
    TrialAsked,
    TrialTold,
)
from sweeps.home import Home
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import parse_spec

MLFLOW = "http://127.0.0.1:5000"

SPEC = """\
name: {name}
task: {{type: digits}}
lora: {{target_modules: [fc1, fc2]}}
parameters:
  rank: {{values: [2, 4, 8]}}
  lr: {{min: 1e-3, max: 1e-1}}
  init_scale: {{min: 0.25, max: 4}}
  alpha: {{values: [4, 16]}}
train: {{optimizer: adamw, steps: 40, batch_size: 8}}
search: {{method: random, trials: {trials}, pruner: {{type: none}}}}
certify: {{classes: 1, steps: 2}}
compute: {{workers: 1, pack: 4}}
"""


@dataclass
class Still:
    """A service that answers and does nothing by itself.

    Attributes:
        url: where.
        service: the verbs.
        ledger: its events.
    """

    url: str
    service: Service
    ledger: Ledger

    def token(self, user: str = "ada", scope: Scope = "submit", *, expires_at_s: float | None = None) -> str:
        """Makes a token."""
        made = make_token()
        audit = AuditEntry("test", "token create")
        self.service.store.add_token(made, user=user, scope=scope, note="", expires_at_s=expires_at_s, audit=audit)
        return made.text

    def submit(
        self,
        name: str = "tiny",
        *,
        owner: str = "ada",
        trials: int = 4,
        comment: str = "",
        source: str = "tiny.yaml",
        tracking_uri: str = MLFLOW,
    ) -> str:
        """Puts a sweep into the queue; its id."""
        text = SPEC.format(name=name, trials=trials) + comment
        spec = parse_spec(text, source).spec
        plan = make_plan(spec, Reduction.of(spec), workers=1, most_members=None)
        created = SweepCreated(
            name=name,
            spec=spec.model_dump(mode="json"),
            spec_text=text,
            source=source,
            plan=plan.model_dump(mode="json"),
            tracking_uri=tracking_uri,
            experiment=name,
            lanes=2,
            pack=4,
        )
        sweep = f"{name}-{len(self.ledger.sweeps()):06x}"
        row = Submission(sweep, owner, name, False, 0, 1.0, trials, time.time())
        self.service.store.submit(row, created, AuditEntry(owner, "submit", sweep))
        return sweep

    def move(self, sweep: str, state: QueueState, reason: str = "") -> None:
        """Moves a sweep in the queue, as the supervisor does."""
        assert self.service.store.move(self.service.store.get(sweep), state, reason)

    def add(self, sweep: str, *events: Event) -> None:
        """Appends events, as a driver does."""
        self.ledger.append(sweep, events)

    def end_trial(self, sweep: str, number: int, value: float) -> None:
        """Has a trial finish."""
        self.add(sweep, *trial(number, value))

    def finish(self, sweep: str) -> None:
        """Has a sweep finish."""
        self.add(sweep, SweepEnded(state="finished"))
        self.move(sweep, "finished")


def trial(number: int, value: float, *, lr: float = 0.01) -> Sequence[Event]:
    """What the ledger has of a trial that was trained and finished."""
    point = Configuration(rank=4, alpha=8.0, lr=lr * (number + 1), init_scale=0.5)
    values = {"rank": 1.0, "lr": point.lr, "init_scale": point.init_scale}
    metrics = {"eval/loss": value, "eval/accuracy": 0.9}
    return (
        TrialAsked(trial=number, values=values, configuration=point, class_id=f"c-{number}"),
        JobStarted(job=number, trials=(number,), start=0, stop=40),
        RungReported(trial=number, job=number, step=40, metrics=metrics),
        JobEnded(job=number, wall_s=1.0),
        TrialTold(trial=number, state="finished", value=value),
    )


def certificate(number: int, verdict: str = "bit-identical") -> Certified:
    """A class's certificate, with one twin."""
    point = {"rank": 4, "alpha": 8.0, "lr": 0.01, "init_scale": 0.5}
    twin = {
        "configuration": point | {"alpha": 32.0, "lr": 0.005, "init_scale": 0.25},
        "exact_in_binary": True,
        "verdict": verdict,
        "max_ratio": 0.0,
        "losses": [1.0],
        "update_norms": {},
    }
    whole = {"class_id": f"c-{number}", "trial": number, "steps": 2, "representative": point, "losses": [1.0]}
    return Certified(certificate=whole | {"update_norms": {}, "controls": 4, "twins": [twin]})


def begin() -> DriverStarted:
    """A driver begins."""
    return DriverStarted(resumed=False)


@contextlib.contextmanager
def standing_still(home_path: Path) -> Iterator[Still]:
    """A service without anybody who looks after its queue, in a thread, for as long as the context lasts."""
    home_path.mkdir(mode=0o700)
    home, ledger = Home(home_path), Ledger.in_directory(home_path)
    settings, store, records = Settings(), Store(ledger), Records(ledger)
    planner = Planner(home, processes=1, limit_s=60)
    policy = Policy(Rules(1.0, None, None, {}), window_s=3600, cancel_s=60)
    supervisor = Supervisor(store, ledger, records, LocalRunner(home, {}), policy)
    service = Service(settings, home, ledger, store, records, planner, supervisor, devices=1, tracking_uri=MLFLOW)
    hub = Hub(ledger)
    config = uvicorn.Config(make_app(service, hub), port=0, log_level="warning", ws="none", server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service must start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Still(f"http://127.0.0.1:{port}", service, ledger)
    finally:
        hub.close()
        server.should_exit = True
        thread.join(timeout=30)
        planner.close()
        ledger.close()
