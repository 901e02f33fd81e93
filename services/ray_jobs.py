"""Drivers on a cluster: one Ray job a sweep, on the cluster's head, through Ray's Jobs API.

    address        of the head's dashboard: http://HEAD:8265
    submission id  SWEEP-N, where N counts the attempts: the handle of a driver
    metadata       `lora_sweeps.sweep`: by it the jobs of a sweep are found again, whoever has lost their handles
    entrypoint     `lora-sweeps drive SWEEP --address auto`, its output appended to the sweep's log

The service itself never connects to Ray as a driver does: it asks over HTTP, and a dead head leaves it alive. The
state directory must be one that the service and all nodes see under the same path; the driver's whole output is in its
log there, so there is nothing that only Ray has.

The head needs lora-sweeps on its PATH: start Ray in the environment that has it. Where the head wants a token, the
service needs it too: `RAY_AUTH_MODE=token`, and `RAY_AUTH_TOKEN_PATH` or `RAY_AUTH_TOKEN`. Nothing needs to be set on
the head for a driver to have time to end in order: how long Ray waits between SIGTERM and SIGKILL travels with the job.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services import ray_client
from services.runner import Ending
from sweeps.errors import InputError, StateError
from sweeps.home import Home
from sweeps.secrecy import has_secret, hide_passwords


def drive_command(sweep: str) -> str:
    """The shell's words that drive a sweep on the cluster they run on."""
    return f"lora-sweeps drive {shlex.quote(sweep)} --address auto"


class RayJobsRunner:
    """Starts and stops drivers as Ray jobs; see `services.runner.Runner`.

    Whatever Ray cannot be asked now is a ClusterError, which says nothing about a driver: it may well go on.
    """

    def __init__(
        self,
        address: str,
        home: Home,
        *,
        command: Callable[[str], str] = drive_command,
        grace_s: int = ray_client.GRACE_S,
    ) -> None:
        """Connects to nothing yet.

        Args:
            address: of the head's dashboard, with http:// or https://.
            home: the state directory, which every node sees.
            command: one command in the shell's words that drives a sweep.
            grace_s: how long an interrupted driver has to end in order, before Ray kills it.

        Raises:
            InputError: the address is none, or the environment would send us or a secret elsewhere.
        """
        self._address, self._shown = address.rstrip("/"), hide_passwords(address)
        self._home, self._command, self._grace_s = home, command, grace_s
        self._client: Any = None
        if not address.startswith(("http://", "https://")):
            raise InputError(
                f"a Ray cluster's jobs are submitted to the dashboard of its head, as in http://head:8265; found "
                f"{self._shown!r}; give that address"
            )
        for name in ray_client.OVERRIDES:
            if os.environ.get(name):
                raise InputError(
                    f"Ray jobs must go to {self._shown}; found {name}, which Ray would follow instead; unset it for "
                    "the service"
                )
        if os.environ.get("LORA_SWEEPS_DATABASE") and not os.environ.get("LORA_SWEEPS_DATABASE_FILE"):
            raise InputError(
                "a Ray job's environment is shown in Ray's dashboard, so it must not hold the ledger's URL; found "
                "LORA_SWEEPS_DATABASE; put the URL into a file that all nodes see, and name that in "
                "LORA_SWEEPS_DATABASE_FILE"
            )

    def start(self, sweep: str, gpus: Sequence[str] = ()) -> str:
        """Submits a driver of the sweep, and returns its submission id.

        Raises:
            StateError: one runs already, or its log cannot be written.
            ClusterError: the cluster cannot be asked, or refuses. The driver may have been started all the same, where
                the answer was lost: `find` finds it.
        """
        with self._asking() as client:
            jobs = ray_client.jobs_of(client, sweep)
        if (running := ray_client.running(jobs)) is not None:
            raise StateError(
                f"one driver drives a sweep; the Ray job {running} drives {sweep} now: wait for it or stop it"
            )
        submission = f"{sweep}-{ray_client.next_attempt(jobs)}"
        # With `exec` the job's process is the driver itself: signals reach it, and its exit code is the job's.
        entrypoint = f"exec {self._command(sweep)} >>{shlex.quote(str(self._log(sweep)))} 2>&1"
        with self._asking() as client:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission,
                metadata={ray_client.SWEEP: sweep},
                runtime_env={"env_vars": self._environment()},
            )
        return submission

    def find(self, sweep: str, handle: str) -> str | None:
        """The submission id of the driver that runs the sweep now; None where none does.

        Raises:
            ClusterError: the cluster cannot be asked.
        """
        with self._asking() as client:
            if handle:
                job = ray_client.job_of(client, handle)
                if job is not None and not job.status.is_terminal():
                    return handle
            return ray_client.running(ray_client.jobs_of(client, sweep))

    def ended(self, sweep: str, handle: str) -> Ending | None:
        """How a driver ended; None while it runs, or waits for its start.

        Raises:
            ClusterError: the cluster cannot be asked.
        """
        with self._asking() as client:
            job = ray_client.job_of(client, handle)
        return _ending(job)

    def interrupt(self, sweep: str, handle: str) -> None:
        """Has Ray send SIGTERM to a driver, and SIGKILL where it has not ended within `grace_s`.

        Raises:
            ClusterError: the cluster cannot be asked.
        """
        with self._asking() as client:
            try:
                client.stop_job(handle)
            except RuntimeError as error:
                if not ray_client.says_unknown(error):
                    raise

    def kill(self, sweep: str, handle: str) -> None:
        """Makes sure that a driver ends: where it was asked to, Ray kills it `grace_s` after that.

        Ray's Jobs API knows no quicker way, and this one needs nobody who watches over it.

        Raises:
            ClusterError: the cluster cannot be asked.
        """
        self.interrupt(sweep, handle)

    def _environment(self) -> dict[str, str]:
        """What a driver is told; Ray shows it to everybody who may see its dashboard."""
        found = {"LORA_SWEEPS_HOME": str(self._home.path), "RAY_JOB_STOP_WAIT_TIME_S": str(self._grace_s)}
        found["HF_HUB_OFFLINE"] = "1"  # what is trained lies under the administrator's roots
        if database := os.environ.get("LORA_SWEEPS_DATABASE_FILE"):
            found["LORA_SWEEPS_DATABASE_FILE"] = str(Path(database).absolute())
        tracking = os.environ.get("MLFLOW_TRACKING_URI")
        if tracking and not has_secret(tracking):
            found["MLFLOW_TRACKING_URI"] = tracking
        return found

    def _log(self, sweep: str) -> Path:
        """The sweep's log, which is there and is nobody else's to read before the head's shell appends to it."""
        path = self._home.logs(sweep)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        except OSError as error:
            raise StateError(
                f"the log of a driver must be a file that can be written; {path} cannot: {error.strerror}; mend that, "
                "or set LORA_SWEEPS_HOME"
            ) from error
        return path

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """Yields a client; what goes wrong meanwhile becomes a ClusterError."""
        with ray_client.asking(self._address, whose="for the service, and start it again"):
            if self._client is None:
                self._client = ray_client.connect(self._address)
            yield self._client


def _ending(job: Any) -> Ending | None:
    if job is None:
        return Ending("the Ray cluster knows the job no longer: its head was started anew")
    if not job.status.is_terminal():
        return None
    if job.status.value == "STOPPED":
        return Ending("the Ray job was stopped")
    code = job.driver_exit_code
    if code is None:
        return Ending(f"the Ray job failed: {ray_client.brief(job.message or 'for no reason that Ray tells')}")
    if code == ray_client.NOT_FOUND:
        return Ending(f"exit code {code}: its program is not on the PATH of the cluster's head")
    if code < 0:
        return Ending(f"killed by {signal.Signals(-code).name}")
    said = ray_client.said_by_shell(job.message or "")
    return Ending(f"exit code {code}" + (f": {ray_client.brief(said)}" if said else ""))
