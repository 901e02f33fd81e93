"""A sweep that waits for nodes to come and go under it, and what must have become of it in the end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweeps.events import JobEnded, JobStarted, TrialTold
from sweeps.ledger import Ledger, Record
from sweeps.spec import load_spec
from sweeps.training import JobRunner
from tests.cluster_support import RayNode, kill_all_with, until
from tests.support import command, environment, record_of, trajectory_of
from tests.sweeps.support import Simulation

# A sampler that does not look back, and no pruner: a job that is run again changes nothing of what comes after it.
SPREAD_SPEC = """\
name: spread
task: {type: python, entrypoint: held_digits:make_task, options: {hold: HOLD}}
lora: {target_modules: [fc1, fc2]}
parameters:
  rank: {values: [2, 4, 8]}
  lr: {min: 1e-3, max: 1e-1}
train: {optimizer: adamw, steps: 60, batch_size: 16, schedule: constant}
search: {method: random, trials: 16, pruner: {type: none, rungs: [20, 40, 60]}}
certify: {classes: 0}
compute: {workers: 2, pack: 2}
"""

_RUNGS = (20, 40, 60)
_SWEEP_PATIENCE_S = 900


def write_spec(folder: Path) -> Path:
    """Writes the spec and its task to a directory."""
    shutil.copy(Path(__file__).with_name("held_digits.py"), folder)
    path = folder / "spread.yaml"
    path.write_text(SPREAD_SPEC.replace("HOLD", str(folder / "hold")))
    return path


def undisturbed(folder: Path) -> dict[int, tuple[Any, ...]]:
    """What the sweep finds in one process, without Ray: its trajectory."""
    runner, here = JobRunner(), {"cache": str(folder / "cache"), "checkpoints": str(folder / "checkpoints")}
    spec = load_spec(write_spec(folder)).spec
    whole = Simulation(spec, trials=16, rungs=_RUNGS, pack=2, lanes=3)
    whole.run(lambda order: runner.run(order.model_copy(update=here)))
    return trajectory_of(whole.record)


class Running:
    """A sweep that the real program runs, and what its ledger says meanwhile."""

    def __init__(self, process: subprocess.Popen[bytes], cwd: Path) -> None:
        self.process, self.cwd = process, cwd

    @property
    def said(self) -> str:
        """Its progress so far."""
        return (self.cwd / "stderr").read_text()

    def hold(self) -> None:
        """Lets no job come to its end from now on."""
        until(lambda: self.process.poll() is not None or "waiting for the first worker" in self.said)
        (self.cwd / "hold").touch()

    def wait_until_held_on(self, *nodes: RayNode) -> None:
        """Waits until each of these nodes is in the middle of a job, which does not go on."""
        self.until(lambda: all(node.pids & self._held() for node in nodes))

    def let_go(self) -> None:
        """Lets jobs go on."""
        (self.cwd / "hold").unlink()

    def _held(self) -> set[int]:
        return {int(path.name.removeprefix("held-")) for path in self.cwd.glob("held-*")}

    def records(self) -> list[Record]:
        """The ledger of its one sweep."""
        if not (self.cwd / ".lora-sweeps" / "ledger.db").exists():
            return []
        ledger = Ledger.in_directory(self.cwd / ".lora-sweeps")
        try:
            return [record for sweep in ledger.sweeps() for record in ledger.read(sweep.id)]
        finally:
            ledger.close()

    def ended(self) -> list[JobEnded]:
        """The jobs that came back."""
        return [record.event for record in self.records() if isinstance(record.event, JobEnded)]

    def lost(self) -> list[JobEnded]:
        """The jobs that came back without a result."""
        return [job for job in self.ended() if job.error is not None]

    def wait_for_jobs_on(self, *addresses: str, more_than: Counter[str] | None = None) -> None:
        """Waits until each of these nodes has done a job, and more than it had done before."""
        before = more_than or Counter()
        self.until(lambda: all(self.done()[address] > before[address] for address in addresses))

    def done(self) -> Counter[str]:
        """How many jobs each node did."""
        return Counter(job.node for job in self.ended() if job.error is None)

    def until(self, condition: Any) -> None:
        """Waits until something is so, at the latest when the sweep has ended."""
        until(lambda: self.process.poll() is not None or condition(), patience_s=_SWEEP_PATIENCE_S)
        assert condition(), f"the sweep ended first:\n{self.said}"

    def wait(self) -> int:
        """Waits until it ends; its exit code."""
        return self.process.wait(_SWEEP_PATIENCE_S)

    def check_whole(self, expected: dict[int, tuple[Any, ...]]) -> None:
        """Every trial is there, was told once, and came out as if nothing had happened."""
        record, events = record_of(self.cwd), [record.event for record in self.records()]
        assert record.state == "finished"
        assert record.counts() == {"finished": 16, "pruned": 0, "diverged": 0, "failed": 0, "waiting": 0}
        assert trajectory_of(record) == expected
        assert Counter(event.trial for event in events if isinstance(event, TrialTold)) == Counter(list(record.trials))
        # Each job that was started has ended, and no stretch of a trial's training counted twice.
        assert record.jobs_started.keys() == record.jobs_ended.keys()
        trained = [
            (trial, event.stop)
            for event in events
            if isinstance(event, JobStarted) and record.jobs_ended[event.job].error is None
            for trial in event.trials
        ]
        assert set(trained) == {(trial, stop) for trial in record.trials for stop in _RUNGS}


@contextmanager
def sweep_on(cwd: Path, *arguments: str, inside: Sequence[str] = (), **env: str) -> Iterator[Running]:
    """Starts `lora-sweeps run` with these arguments, in a directory that has the spec as spread.yaml; ends it at last.

    Args:
        cwd: where it runs.
        arguments: of `lora-sweeps run`.
        inside: words before the command.
        env: more of the environment.
    """
    write_spec(cwd)
    mark = f"TESTS_SWEEP={os.getpid()}-{cwd.name}"
    name, _, value = mark.partition("=")
    with (cwd / "stdout").open("wb") as stdout, (cwd / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [*inside, *command("run", *arguments)],
            cwd=cwd,
            env=environment(**env, **{name: value}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield Running(process, cwd)
    finally:
        kill_all_with(mark)
        process.wait()
