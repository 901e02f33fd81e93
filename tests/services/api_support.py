"""The service's HTTP application in this process, over a state directory of its own: its drivers are a simulation."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from services.api import make_app
from services.auth import Scope, make_token
from services.planning import Planned, Room
from services.policy import Places, parse_submitted
from services.queue import Rules
from services.reading import Records
from services.runner import Ending
from services.service import Service
from services.settings import Settings
from services.store import AuditEntry, Store, Submission
from services.streaming import Hub
from services.supervisor import Policy, Supervisor
from sweeps.events import Event, JobEnded, JobStarted, QueueState, RungReported, SweepCreated, TrialAsked, TrialTold
from sweeps.home import Home
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.records import read_sweep
from sweeps.reduction import Reduction
from sweeps.secrecy import hide_passwords
from sweeps.space import Configuration
from sweeps.spec import parse_spec
from tests.services.service_support import TINY_SPEC, YAML

_TIMES = itertools.count(1)


class Idle:
    """A runner that starts nothing."""

    def start(self, sweep: str) -> str:
        return "1"

    def find(self, sweep: str, handle: str) -> str | None:
        return None

    def ended(self, sweep: str, handle: str) -> Ending | None:
        return None

    def interrupt(self, sweep: str, handle: str) -> None:
        pass

    def kill(self, sweep: str, handle: str) -> None:
        pass


@dataclass
class Light:
    """A planner that looks at neither model nor memory, in this process; `fault` is raised in place of an answer.

    Attributes:
        planned: how often a spec was planned.
    """

    home: Home
    fault: Exception | None = None
    planned: int = 0

    async def plan(self, text: str, source: str, places: Places, room: Room, *, timed: bool = False) -> Planned:
        self.planned += 1
        if self.fault is not None:
            raise self.fault
        spec = await asyncio.to_thread(lambda: parse_submitted(text, source, places).spec)
        plan = make_plan(spec, Reduction.of(spec), workers=1, most_members=None)
        plan = plan.with_time(0.001) if timed else plan
        return Planned(spec.model_dump(mode="json"), plan.model_dump(mode="json"), 1.0, hide_passwords(text))

    async def report(self, sweep: str, form: str) -> str:
        from sweeps.report import build, render

        with self.home.ledger() as ledger:
            return render(build(read_sweep(ledger, sweep)), form)  # type: ignore[arg-type]

    async def adapter(self, sweep: str, trial: int | None, archive: Path) -> None:
        archive.write_bytes(b"PK")


@dataclass
class Site:
    """An application with all that is behind it.

    Attributes:
        admin: a token of scope admin, of the user `admin`.
        hub: where events come from; it looks for new ones only while the application runs.
    """

    service: Service
    app: FastAPI
    hub: Hub
    planner: Light
    admin: str = ""
    clients: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def store(self) -> Store:
        return self.service.store

    @property
    def ledger(self) -> Ledger:
        return self.service.ledger

    @property
    def home(self) -> Path:
        return self.service.home.path

    def token(self, user: str, scope: Scope = "submit", *, expires_at_s: float | None = None) -> str:
        """Makes a token."""
        made, audit = make_token(), AuditEntry("test", "token create")
        self.store.add_token(made, user=user, scope=scope, note="", expires_at_s=expires_at_s, audit=audit)
        return made.text

    def client(self, token: str | None = "", **headers: str) -> TestClient:
        """An HTTP client with a token: by default the administrator's; None for none."""
        text = self.admin if token == "" else token
        own = {} if text is None else {"Authorization": f"Bearer {text}"}
        client = TestClient(self.app, base_url="http://localhost", raise_server_exceptions=False, headers=own | headers)
        client.follow_redirects = False
        return client

    def enter(self, sweep: str, *events: Event, state: QueueState = "queued", **changes: Any) -> str:
        """Puts a sweep into the ledger and the queue, as if it had been submitted and had come so far."""
        document = parse_spec(TINY_SPEC, "tiny.yaml")
        plan = make_plan(document.spec, Reduction.of(document.spec), workers=1, most_members=None)
        created = SweepCreated(
            name=changes.get("name", "tiny"),
            spec=document.spec.model_dump(mode="json"),
            spec_text=TINY_SPEC,
            source="tiny.yaml",
            plan=plan.model_dump(mode="json"),
            tracking_uri="sqlite:///mlflow.db",
            experiment="tiny",
            lanes=2,
            pack=4,
        )
        row = Submission(sweep, "ann", "tiny", False, 0, 1.0, 4, submitted_at_s=1e9 + next(_TIMES))
        self.store.submit(replace(row, **changes), created, AuditEntry("ann", "submit", sweep))
        self.ledger.append(sweep, events)
        if state != "queued":
            assert self.store.move(self.store.get(sweep), state)
        return sweep

    def snapshot(self) -> dict[str, Any]:
        """All that the service keeps: to be the same before and after what must change nothing."""
        with self.ledger.database.reading() as connection:
            tables = ("sweeps", "events", "submissions", "tokens", "audit")
            rows = {
                name: [tuple(row) for row in connection.exec_driver_sql(f"select * from {name}")] for name in tables
            }
        # The database's own files change as it is read.
        files = sorted(str(path) for path in self.home.parent.rglob("*") if not path.name.startswith("ledger.db"))
        return rows | {"files": files}


def make_site(directory: Path, **settings: Any) -> Site:
    """Makes an application over a state directory, `home` in a directory."""
    home = Home(directory / "home")
    home.path.mkdir()
    ledger = Ledger.in_directory(home.path)
    chosen = Settings(**settings)
    store, records, planner = Store(ledger), Records(ledger), Light(home)
    policy = Policy(Rules(2, chosen.user_running, chosen.user_device_hours, {}), window_s=3600, cancel_s=60)
    supervisor = Supervisor(store, ledger, records, Idle(), policy)
    service = Service(
        chosen, home, ledger, store, records, planner, supervisor, devices=2, tracking_uri="sqlite:///mlflow.db"
    )  # type: ignore[arg-type]
    hub = Hub(ledger)
    service.looked_at_s = float("inf")  # nobody looks after this queue, and nobody is to complain
    site = Site(service, make_app(service, hub), hub, planner)
    site.admin = site.token("admin", "admin")
    return site


@contextlib.contextmanager
def open_site(directory: Path, **settings: Any) -> Iterator[Site]:
    """An application for as long as the context lasts."""
    site = make_site(directory, **settings)
    try:
        yield site
    finally:
        site.ledger.close()


def trained(trials: Iterable[float | None]) -> list[Event]:
    """What happens while trials are trained, one by one, to these losses; None: it waits still."""
    events: list[Event] = []
    for number, loss in enumerate(trials):
        configuration = Configuration(rank=2, alpha=4.0, lr=0.01 * (number + 1))
        asked = TrialAsked(trial=number, values={"rank": 2}, configuration=configuration, class_id=f"class{number}")
        events += [asked, JobStarted(job=number, trials=(number,), start=0, stop=4)]
        if loss is not None:
            metrics = {"eval_loss": loss, "eval_accuracy": 0.5}
            events += [
                RungReported(trial=number, job=number, step=4, metrics=metrics),
                JobEnded(job=number, train_s=1.0),
                TrialTold(trial=number, state="finished", value=loss),
            ]
    return events


def posted(client: TestClient, spec: str = TINY_SPEC, headers: dict[str, str] | None = None, **query: Any) -> Any:
    """Submits a spec; the answer."""
    return client.post("/v1/sweeps", content=spec, params=query, headers=YAML | (headers or {}))


def soon(seconds: float) -> float:
    """A time that is so far ahead, in seconds since the epoch."""
    return time.time() + seconds


def problem_of(answer: Any, status: int) -> dict[str, Any]:
    """The problem that an answer says, with this status."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"].startswith("application/problem+json"), answer.headers
    body = answer.json()
    assert (body["status"], bool(body["detail"])) == (status, True)
    return dict(body)
