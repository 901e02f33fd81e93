"""A Ray head with a dashboard, behind a token, for tests of what is asked of it over HTTP."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import environment, free_ports, pids_with

TINY = """\
name: tiny
task: {type: digits}
lora: {target_modules: [fc1, fc2]}
parameters:
  rank: {values: [2, 4]}
  lr: {min: 1e-3, max: 1e-1}
train: {optimizer: adamw, steps: 4, batch_size: 8}
search: {method: random, trials: 2, pruner: {type: none}}
certify: {classes: 0}
compute: {workers: 1, pack: 2}
"""


@contextlib.contextmanager
def ray_setting(**settings: str) -> Iterator[None]:
    """Ray's settings of this process, which Ray reads once unless it is made to read them again."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_", "LORA_SWEEPS"))]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        from ray._raylet import AuthenticationTokenLoader, Config

        try:
            AuthenticationTokenLoader.instance().reset_cache()
            Config.initialize("")
            yield
        finally:
            patch.undo()
            AuthenticationTokenLoader.instance().reset_cache()
            Config.initialize("")


@dataclass(frozen=True)
class Head:
    """A head that runs.

    Attributes:
        address: of its dashboard.
        client: of its Ray Client server.
        token: what it lets in.
    """

    address: str
    client: str
    token: str

    @property
    def settings(self) -> dict[str, str]:
        """What a process needs to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def ray_head(**settings: str) -> Iterator[Head]:
    """A head with a dashboard, behind a token that this process has.

    Args:
        settings: of its environment.
    """
    token = secrets.token_hex(32)
    dashboard, client, agent, agent_grpc = free_ports(4)
    words = f"""start --head --block --port=0 --num-cpus=1 --node-ip-address=127.0.0.1 --object-store-memory={2**27}
        --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port={dashboard}
        --ray-client-server-port={client} --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}
        --min-worker-port=0 --max-worker-port=0"""
    # Ray puts sockets below its directory, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        env = environment(
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            RAY_TMPDIR=scratch,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=token,
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            **settings,
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", *words.split()]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "Ray runtime started" in line:
                    break
            assert process.poll() is None, "".join(said)
            with ray_setting(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token):
                yield Head(f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}", token)
        finally:
            for pid in pids_with(f"RAY_AUTH_TOKEN={token}") - {os.getpid()} | {process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def until(condition: Callable[[], Any], *, patience_s: float = 60) -> Any:
    """Waits until something holds, and returns it."""
    deadline_s = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.1)
    return found
