"""A service as an administrator starts it: the real program, in a process of its own, on any free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

from services import credentials
from services.auth import Scope, make_token
from services.store import AuditEntry, Store
from sweeps.ledger import Ledger
from tests.support import command, environment

TINY_SPEC = """\
name: tiny
task: {type: digits}
lora: {target_modules: [fc1, fc2]}
parameters:
  rank: {values: [2, 4]}
  lr: {min: 1e-3, max: 1e-1}
  alpha: {values: [4, 16]}
train: {optimizer: adamw, steps: 4, batch_size: 8}
search: {method: random, trials: 4, pruner: {type: none}}
certify: {classes: 1, steps: 2}
compute: {workers: 1, pack: 4}
"""


# Many short jobs, and no end of them while the test runs.
LONG_SPEC = TINY_SPEC.replace("trials: 4", "trials: 5000").replace("rank: {values: [2, 4]}", "rank: 2").replace(
    "alpha: {values: [4, 16]}", "init_scale: {min: 0.5, max: 2}"
)  # fmt: skip


@dataclass
class Served:
    """A service that runs.

    Attributes:
        url: where.
        home: its state directory.
        token: of scope admin.
        process: the service.
    """

    url: str
    home: Path
    token: str
    process: subprocess.Popen[str]

    def client(self, token: str | None = "") -> httpx.Client:
        """A plain HTTP client with a token: by default the administrator's; None for none."""
        text = self.token if token == "" else token
        headers = {} if text is None else {"Authorization": f"Bearer {text}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def add_token(self, user: str, scope: Scope = "submit", *, expires_at_s: float | None = None) -> str:
        """Makes a token as `lora-sweeps token create` does."""
        made = make_token()
        with Ledger.in_directory(self.home) as ledger:
            audit = AuditEntry("test", "token create")
            Store(ledger).add_token(made, user=user, scope=scope, note="", expires_at_s=expires_at_s, audit=audit)
        return made.text

    def submit(self, spec: str = TINY_SPEC, *, token: str | None = "", **query: Any) -> str:
        """Submits a spec; the sweep's id."""
        with self.client(token) as client:
            answer = client.post("/v1/sweeps", content=spec, params=query, headers=YAML)
            assert answer.status_code == 201, answer.text
            return str(answer.json()["sweep"])

    def status(self, sweep: str) -> dict[str, Any]:
        """A sweep's status."""
        with self.client() as client:
            answer = client.get(f"/v1/sweeps/{sweep}")
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

    def wait_for(self, sweep: str, *states: str, timeout_s: float = 120) -> dict[str, Any]:
        """Waits until a sweep is in one of these states."""
        deadline_s = time.monotonic() + timeout_s
        while (found := self.status(sweep))["state"] not in states:
            assert time.monotonic() < deadline_s, (found["state"], found["reason"], self.log(sweep))
            time.sleep(0.1)
        return found

    def log(self, sweep: str) -> str:
        """What the sweep's drivers wrote."""
        path = self.home / "logs" / f"{sweep}.log"
        return path.read_text() if path.exists() else ""


YAML = {"Content-Type": "application/yaml"}


def start(home: Path, *options: str, **env: str) -> Served:
    """Starts a service, and waits until it answers."""
    process = subprocess.Popen(
        command("serve", "--port", "0", *options),
        cwd=home.parent,
        env=environment(LORA_SWEEPS_HOME=str(home), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if match := re.search(r"serving (https?://\S+);", line):
            token = credentials.read(home / "tokens").get(match[1], "")
            return Served(match[1], home, token, process)
    raise AssertionError("".join(said))


def stop(served: Served) -> str:
    """Stops a service in order; what it said at the end."""
    served.process.send_signal(signal.SIGTERM)
    said, _ = served.process.communicate(timeout=60)
    return said


def kill_drivers(home: Path) -> None:
    """Leaves nothing behind: drivers outlive their service by design."""
    for lock in (home / "locks").glob("*"):
        text = lock.read_text()
        if text.isdecimal():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(text), signal.SIGKILL)


@contextlib.contextmanager
def serving(home: Path, *options: str, **env: str) -> Iterator[Served]:
    """A service for as long as the context lasts, and none of its drivers after that."""
    served = start(home, *options, **env)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            stop(served)
        kill_drivers(home)
