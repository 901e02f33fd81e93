"""Starts, finds and stops drivers: one process a sweep on this machine. On a cluster: `services/ray_jobs.py`.

A driver lives in a session of its own and is no part of the service: it goes on when the service stops or is killed.
What proves that it lives is the sweep's lock, which it was handed over and which the system takes back when it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sweeps.errors import ClusterError, InputError
from sweeps.home import LOCK_VARIABLE, Home


@dataclass(frozen=True, slots=True)
class Ending:
    """How a driver ended, as far as its runner can tell; what it achieved is in the ledger."""

    reason: str


class Runner(Protocol):
    """Starts and stops drivers, one a sweep, and finds them again after its own restart.

    A handle is a driver's name in words: a process id, a Ray job's id. Where nothing can be said for now, because a
    cluster does not answer, `find` and `ended` raise ClusterError.
    """

    def start(self, sweep: str, gpus: Sequence[str] = ()) -> str:
        """Starts a driver, and returns its handle.

        Args:
            sweep: the sweep's id.
            gpus: those of this machine that it may use; none where that is not for the service to say.

        Raises:
            StateError: one drives the sweep already.
            InputError: none can be started.
        """

    def find(self, sweep: str, handle: str) -> str | None:
        """The handle of the driver that drives the sweep now; None where none does. `handle` is the last one known."""

    def ended(self, sweep: str, handle: str) -> Ending | None:
        """How the driver with this handle ended; None while it is there."""

    def interrupt(self, sweep: str, handle: str) -> None:
        """Asks a driver to end in order, as SIGTERM does."""

    def kill(self, sweep: str, handle: str) -> None:
        """Ends a driver that does not end in order."""


class LocalRunner:
    """Runs drivers as processes of this machine."""

    def __init__(self, home: Home, environment: Mapping[str, str] | None = None) -> None:
        """Args:
        home: the state directory.
        environment: of the drivers, beside this process's own.
        """
        self._home = home
        self._environment = dict(environment or {})
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, sweep: str, gpus: Sequence[str] = ()) -> str:
        """Starts a driver; see `Runner`."""
        log = self._home.logs(sweep)
        log.parent.mkdir(mode=0o700, exist_ok=True)
        with self._home.hand_over(sweep) as lock, open(os.open(log, _APPEND, 0o600), "ab") as output:
            environment = os.environ | self._environment | {"LORA_SWEEPS_HOME": str(self._home.path)}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", "services", "drive", sweep],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment | {LOCK_VARIABLE: str(lock)},
                    cwd=self._home.path,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            except OSError as error:
                raise InputError(f"a driver must be a process that can be started; it cannot: {error}") from error
            os.truncate(lock, 0)
            os.pwrite(lock, str(child.pid).encode(), 0)
        self._children[sweep] = child
        return str(child.pid)

    def find(self, sweep: str, handle: str) -> str | None:
        """The process that holds the sweep's lock; see `Runner`."""
        for child in self._children.values():
            child.poll()  # one that ended before anybody had noted it would stay a zombie
        if not self._home.is_driven(sweep):
            return None
        if (pid := self._home.driver_pid(sweep)) is None:
            raise ClusterError(f"a driver of {sweep} is starting, and has not said yet which process it is")
        return str(pid)

    def ended(self, sweep: str, handle: str) -> Ending | None:
        """How the process ended, with its exit code where it is a child of ours; see `Runner`."""
        child = self._children.get(sweep)
        if child is not None and str(child.pid) == handle:
            if (code := child.poll()) is None:
                return None
            del self._children[sweep]
            return Ending(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        return None if self._home.is_driven(sweep) else Ending("its process ended while the service was away")

    def interrupt(self, sweep: str, handle: str) -> None:
        """SIGTERM to the process; see `Runner`."""
        if self.find(sweep, handle) == handle:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(handle), signal.SIGTERM)

    def kill(self, sweep: str, handle: str) -> None:
        """SIGKILL to the process and to what it started; see `Runner`."""
        if self.find(sweep, handle) == handle:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(handle), signal.SIGKILL)


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def gpus_of_this_machine() -> tuple[str, ...]:
    """The GPUs that drivers may be given: those that this process may see, without asking CUDA, which takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip() not in ("", "-1"))
    return tuple(str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*")))
