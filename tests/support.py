"""What tests of whole sweeps share: a small spec, and the program as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.ledger import Ledger, Record
from sweeps.records import SweepRecord, read_sweep

ROOT = Path(__file__).parent.parent

# Small and quick, but with every joint of a large one: a sampler that learns, packs, rungs, certificates.
SMALL_SPEC = """\
name: small
task: {type: digits}
lora: {target_modules: [fc1, fc2]}
parameters:
  rank: {values: [2, 4, 8]}
  lr: {min: 1e-3, max: 1e-1}
  init_scale: {min: 0.25, max: 4}
  alpha: {values: [4, 8, 16, 32, 64]}
train: {optimizer: adamw, steps: 40, batch_size: 16, schedule: cosine, warmup_steps: 4}
search: {method: tpe, trials: 24, pruner: {type: successive_halving, rungs: [10, 20, 40]}}
certify: {classes: 2, steps: 20}
compute: {workers: 2, pack: 4}
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, as strict JSON."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


Here = Callable[..., Done]


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports on which nothing listens."""
    with contextlib.ExitStack() as open_ones:
        probes = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((address, 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    return free_ports(1)[0]


def pids_with(setting: str) -> set[int]:
    """The processes that have this in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and setting.encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
    return found


def command(*arguments: str | Path) -> list[str]:
    """The command line of lora-sweeps, in this interpreter's environment."""
    return [sys.executable, "-c", "from services.cli import main; main()", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """The tests' environment without settings of the machine that would change what a sweep does."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "LORA_SWEEPS"))
    }
    return kept | {"PYTHONPATH": str(ROOT)} | changes


def run_cli(*arguments: str | Path, cwd: Path, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs lora-sweeps to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout_s
    )


def start_cli(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Starts lora-sweeps in a process group of its own, as a shell does."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_json(*arguments: str | Path, cwd: Path) -> Any:
    """Runs lora-sweeps and reads the JSON that it prints."""
    done = run_cli(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for_events(cwd: Path, enough: Callable[[list[Record]], bool], *, process: subprocess.Popen[str]) -> None:
    """Waits until the ledger of a running sweep holds enough, as `enough` sees it."""
    while process.poll() is None:
        if (cwd / ".lora-sweeps" / "ledger.db").exists():
            ledger = Ledger.in_directory(cwd / ".lora-sweeps")
            sweeps = ledger.sweeps()
            records = ledger.read(sweeps[-1].id) if sweeps else []
            ledger.close()
            if enough(records):
                return
        time.sleep(0.05)
    raise AssertionError(f"the sweep ended first:\n{process.communicate()[1]}")


def record_of(cwd: Path, sweep: str = "last") -> SweepRecord:
    """What the ledger of a working directory knows of a sweep."""
    ledger = Ledger.in_directory(cwd / ".lora-sweeps")
    try:
        return read_sweep(ledger, ledger.find(sweep).id)
    finally:
        ledger.close()


def trajectory_of(record: SweepRecord) -> dict[int, tuple[Any, ...]]:
    """All that a search decided, by trial: equal for equal seeds, whatever happened on the way."""
    return {
        trial.number: (trial.configuration, trial.state, trial.value, [(r.step, r.metrics) for r in trial.rungs])
        for trial in record.trials.values()
    }
