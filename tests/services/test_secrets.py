"""Secrets that the service is given are in no answer, no log, no row, no run of MLflow and no command line."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from services.mlflow_server import MlflowServer
from sweeps.home import Home
from sweeps.ledger import Ledger
from tests.postgres_support import postgresql
from tests.services.service_support import TINY_SPEC, YAML, Served, serving, stop
from tests.support import free_port

CANARY = "canary7311canary"


@dataclass
class Lived:
    """What a service left everywhere that ran a sweep to its end, with a secret wherever one can be given.

    Attributes:
        secrets: what must be nowhere.
        answers: by path.
        ledger: all rows.
        tracked: all that MLflow keeps.
        said: what the service printed.
        lines: command lines of all processes of the machine, looked at again and again.
        home: the state directory.
    """

    secrets: tuple[str, ...]
    home: Path
    sweep: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    ledger: str = ""
    tracked: bytes = b""
    said: str = ""
    lines: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    directory = tmp_path_factory.mktemp("secrets")
    beside = Home(directory / "mlflow")
    beside.path.mkdir()
    mlflow = MlflowServer(beside, port=free_port())
    with postgresql(directory / "postgres") as database:
        mlflow.start()
        try:
            uri = mlflow.uri.replace("http://", f"http://ann:{CANARY}@")
            env = {"LORA_SWEEPS_DATABASE": database, "LORA_SWEEPS_TRACKING_URI": uri}
            with serving(directory / "home", "--devices", "2", **env) as served:
                password = urlsplit(database).password or ""
                one = Lived((CANARY, password, served.token.split("_", 2)[2]), served.home)
                _live(one, served)
                one.said = stop(served)
            one.ledger = _rows(database)
            one.tracked = b"".join(path.read_bytes() for path in beside.path.rglob("*") if path.is_file())
        finally:
            mlflow.stop()
    return one


def _live(one: Lived, served: Served) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    one.lines.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        one.sweep = served.submit()
        served.wait_for(one.sweep, "finished", "failed", "paused")
    finally:
        done.set()
        looking.join()
    tails = (
        "",
        "/events",
        "/logs",
        "/best",
        "/report",
        "/report?format=md",
        "/report?format=html",
        "/export?format=trl",
    )
    paths = [f"/v1/sweeps/{one.sweep}{tail}" for tail in tails]
    with served.client() as client:
        for path in (*paths, "/v1/sweeps", "/v1/audit", "/metrics", "/readyz", "/openapi.json", "/"):
            one.answers[path] = client.get(path).text
        spec = TINY_SPEC + f"tracking: {{uri: 'http://ann:{CANARY}@host'}}\n"
        for path in ("/v1/sweeps", "/v1/plan"):
            answer = client.post(path, content=spec, headers=YAML)
            assert answer.status_code == 422
            one.answers[f"POST {path}"] = answer.text
    with served.client(None) as client:
        for path in ("/v1/sweeps", f"/v1/sweeps?token={served.token}"):
            one.answers[f"stranger {path}"] = client.get(path).text


def _rows(database: str) -> str:
    with Ledger(database) as ledger, ledger.database.reading() as connection:
        tables = sa.inspect(connection).get_table_names()
        assert {"events", "submissions", "audit", "tokens"} <= set(tables)
        rows = [repr(tuple(row)) for name in tables for row in connection.exec_driver_sql(f'select * from "{name}"')]
    return "\n".join(rows)


def test_the_sweep_came_to_its_end_with_them(lived: Lived):
    assert '"state":"finished"' in lived.answers[f"/v1/sweeps/{lived.sweep}"]
    assert '"delivered":true' in lived.answers[f"/v1/sweeps/{lived.sweep}"]
    assert "http://***@127.0.0.1" in lived.answers[f"/v1/sweeps/{lived.sweep}"]
    assert lived.sweep in lived.ledger
    assert lived.sweep.encode() in lived.tracked, "else MLflow knows nothing of it"
    assert all(len(secret) >= 16 for secret in lived.secrets)


def test_no_answer_has_a_secret(lived: Lived):
    assert [path for path, text in lived.answers.items() if any(secret in text for secret in lived.secrets)] == []


def test_no_row_of_the_ledger_has_a_secret(lived: Lived):
    assert [line for line in lived.ledger.splitlines() if any(secret in line for secret in lived.secrets)] == []


def test_nothing_in_mlflow_has_a_secret(lived: Lived):
    assert [secret for secret in lived.secrets if secret.encode() in lived.tracked] == []


def test_no_file_has_a_secret_but_the_one_that_tokens_are_for(lived: Lived):
    found = {
        str(path.relative_to(lived.home))
        for path in lived.home.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in lived.secrets)
    }
    assert found == {"tokens"}
    assert not any(secret in lived.said for secret in lived.secrets)


def test_no_command_line_has_a_secret(lived: Lived):
    assert any(" serve " in line for line in lived.lines)
    assert any(f"drive {lived.sweep}" in line for line in lived.lines)
    assert any("raylet" in line for line in lived.lines)
    assert [line for line in lived.lines if any(secret in line for secret in lived.secrets)] == []
