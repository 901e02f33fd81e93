"""`lora-sweeps run SPEC --address http://HEAD:8265`: the sweep as a Ray job on a cluster's head, followed from here.

    address   of the head's dashboard; ray://HEAD:10001 is asked where that is
    job       its submission id, SWEEP-N: the attempt N to drive a sweep
    driver    `lora-sweeps drive-job` on the head, in the directory of the files that were sent

The sweep needs nobody here: whoever follows it may go, and the connection may break. Ray merges what a job writes into
one log, and has no other way back over HTTP; so the driver ends with marks around its outcome (`services/job_log.py`),
which is read from the whole log once the job has ended, whatever a broken connection has lost of it before.

No secret is sent: Ray shows a job's command, environment and metadata to all who see its dashboard.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import signal
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from services import ray_client
from services.job_files import check_alone, check_directory
from services.job_log import JobLog
from sweeps.errors import ClusterError, InputError, StateError
from sweeps.home import new_id
from sweeps.secrecy import has_secret, hide_passwords
from sweeps.spec import SpecDocument, load_spec

_SILENCE_S = 60.0
"""After which a connection to a log is made anew: it may have died without a word."""

_PATIENCE_S = 600.0
"""How long a head may be away while its job is followed; a laptop's sleep is not counted."""

_RETRY_S = (1.0, 2.0, 5.0, 10.0)

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_TRACKING = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was submitted.

    Attributes:
        job: its submission id.
        address: of the cluster's dashboard.
        sweep: the sweep that it drives, as far as that is known here.
    """

    job: str
    address: str
    sweep: str

    @property
    def follow(self) -> str:
        """The command that shows the job's log, and goes on with it."""
        return f"ray job logs --follow --address {shlex.quote(self.address)} {self.job}"

    @property
    def stop(self) -> str:
        """The command that ends the sweep in order."""
        return f"ray job stop --address {shlex.quote(self.address)} {self.job}"

    @property
    def resume(self) -> str:
        """The command that goes on with a sweep that has ended too early."""
        return f"lora-sweeps run --resume {shlex.quote(self.sweep)} --address {shlex.quote(self.address)}"


class Remote:
    """A cluster to which sweeps are submitted."""

    def __init__(self, address: str) -> None:
        """Connects to it.

        Args:
            address: http://HEAD:8265, https://…, or ray://HEAD:10001.

        Raises:
            ClusterError: it does not answer, or wants a token.
            InputError: the address holds a password, or this installation cannot submit jobs.
        """
        if has_secret(address):
            raise InputError(
                f"--address must hold no password, for the commands that are printed have it; found "
                f"{hide_passwords(address)}; a Ray cluster's own token is set by RAY_AUTH_TOKEN_PATH"
            )
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise InputError(
                "to submit a sweep as a Ray job, Ray's client must be installed whole; aiohttp is not there: "
                "pip install 'lora-sweeps[cluster]'"
            ) from None
        for name in ray_client.OVERRIDES:
            os.environ.pop(name, None)  # Ray would follow it in place of the address that was given
        self.address = address.rstrip("/")
        with self._asking():
            if self.address.startswith("ray://"):
                self.address = ray_client.dashboard_of(self.address)
        with self._asking():
            self._client = ray_client.connect(self.address)

    def start(self, document: SpecDocument, *, name: str | None, directory: Path | None) -> Submitted:
        """Submits a new sweep.

        Args:
            document: its spec, read from a file.
            name: in place of the spec's own.
            directory: that is sent, with the spec in it; None for the spec alone.

        Raises:
            SpecError: the spec names what is not sent.
            ClusterError: the cluster refuses, or cannot be asked.
        """
        spec = Path(document.source)
        if name is not None and not re.fullmatch(_NAME, name):
            raise InputError(
                f"--name must be 1 to 64 letters, digits, dots, dashes and underscores, for a job of Ray's is called "
                f"so; found {name!r}"
            )
        sweep = new_id(name or document.spec.name)
        words = ["--sweep", sweep, *(("--name", name) if name else ())]
        if directory is None:
            check_alone(document, spec)
            with tempfile.TemporaryDirectory(prefix="lora-sweeps-") as alone:
                (Path(alone) / spec.name).write_text(document.text, encoding="utf-8")
                return self._submit(sweep, f"{sweep}-1", words, {"working_dir": alone}, place=spec.name)
        excludes = check_directory(document, spec, directory)
        place = str(spec.resolve().relative_to(directory.resolve()))
        sent = {"working_dir": str(directory.resolve()), "excludes": excludes}
        return self._submit(sweep, f"{sweep}-1", words, sent, place=place)

    def resume(self, sweep: str, *, trials: int | None) -> Submitted:
        """Submits a job that goes on with a sweep, which the head finds by its id, its name, or `last`.

        Raises:
            StateError: a job drives it now.
            ClusterError: the cluster refuses, or cannot be asked.
        """
        with self._asking():
            jobs = ray_client.jobs_of(self._client, sweep)
        if (busy := ray_client.running(jobs)) is not None:
            other = Submitted(busy, self.address, sweep)
            raise StateError(
                f"one driver drives a sweep; the Ray job {busy} drives {sweep} now: follow it with `{other.follow}`, "
                f"or stop it with `{other.stop}`"
            )
        # What the head alone can look up, a name say, has no attempts that could be counted.
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", sweep)
        job = f"{plain}-{ray_client.next_attempt(jobs)}" if jobs else f"{plain}-resumed-{secrets.token_hex(3)}"
        more = () if trials is None else ("--trials", str(trials))
        return self._submit(sweep, job, ["--resume", sweep, *more], {})

    def _submit(
        self, sweep: str, job: str, words: list[str], sent: dict[str, Any], *, place: str | None = None
    ) -> Submitted:
        tracking = tracking_sent()
        command = ["lora-sweeps", "drive-job", *words, "--at", self.address]
        command += ("--tracking", tracking) if tracking else ()
        command += () if place is None else ("--", place)  # its name may begin with a dash
        submitted = Submitted(job, self.address, sweep)
        try:
            with self._asking():
                self._client.submit_job(
                    # With `exec` the job's process is the driver: signals reach it, and its exit code is the job's.
                    entrypoint=f"exec {shlex.join(command)}",
                    submission_id=job,
                    metadata={ray_client.SWEEP: sweep},
                    runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(ray_client.GRACE_S)}, **sent},
                )
        except KeyboardInterrupt:
            click.echo(f"\nit may have been submitted all the same; then `{submitted.stop}` stops it", err=True)
            raise
        return submitted

    def follow(self, submitted: Submitted, log: JobLog) -> Any:
        """Shows a job's log until the job has ended, and returns what Ray knows of it.

        Raises:
            ClusterError: the cluster has not answered for `_PATIENCE_S`, or knows the job no longer.
        """
        heard_s, waits = time.monotonic(), iter(_RETRY_S)

        def take(start: int, text: str) -> int:
            nonlocal heard_s
            heard_s = time.monotonic()
            return log.read(start, text)

        while True:
            broken = False
            try:
                ray_client.tail(self._client, submitted.job, take, silence_s=_SILENCE_S)
            except Exception:
                broken = True  # however it broke, and be it that a proxy has no WebSockets: then the log is asked for
            try:
                if (details := self._ended(submitted, log)) is not None:
                    return details
                if broken:
                    self._read(submitted, log)
                heard_s, waits = time.monotonic(), waits if broken else iter(_RETRY_S)
            except ClusterError as error:
                if time.monotonic() - heard_s > _PATIENCE_S:
                    raise ClusterError(f"{error}; the sweep may well go on: `{submitted.follow}`") from None
                click.echo(f"the cluster at {self.address} does not answer now; asking again", err=True)
            time.sleep(next(waits, _RETRY_S[-1]) if broken else _RETRY_S[0])

    def _ended(self, submitted: Submitted, log: JobLog) -> Any:
        with self._asking():
            details = ray_client.job_of(self._client, submitted.job)
            if details is not None and not details.status.is_terminal():
                return None
        if details is None:
            raise _LostError(
                f"the Ray cluster at {self.address} must know the job {submitted.job}; it does not: its head was "
                f"started anew; go on with `{submitted.resume}`"
            )
        self._read(submitted, log)
        log.close()
        return details

    def _read(self, submitted: Submitted, log: JobLog) -> None:
        with self._asking():
            log.read(0, self._client.get_job_logs(submitted.job))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with ray_client.asking(self.address, whose="here"):
            yield


class _LostError(InputError):
    """The head knows the job no longer."""


def tracking_sent() -> str | None:
    """The tracking URI of this environment, if the head can use it; says on stderr what becomes of it.

    Raises:
        InputError: it is no address.
    """
    uri = os.environ.get(_TRACKING)
    if not uri:
        return None
    try:
        host = urllib.parse.urlsplit(uri).hostname if uri.startswith(("http://", "https://")) else None
    except ValueError as error:
        raise InputError(
            f"{_TRACKING} must be the address of an MLflow server, or of its database; found {hide_passwords(uri)} "
            f"({error}); correct it, or unset it"
        ) from None
    if has_secret(uri):
        why = "for it holds a secret"
    elif host is None or host in ("localhost", "127.0.0.1", "::1"):
        why = "for it is a place on this machine"
    else:
        click.echo(f"{_TRACKING}={uri} is sent, for where the head has none of its own", err=True)
        return uri
    click.echo(f"{_TRACKING} is not sent, {why}: set it in the head's environment", err=True)
    return None


def run_remotely(
    address: str,
    *,
    spec: Path | None,
    name: str | None,
    resume: str | None,
    trials: int | None,
    directory: Path | None,
    detach: bool,
    as_json: bool,
) -> int:
    """Submits a sweep, or a sweep's continuation, follows it unless told not to, and returns the exit code."""
    from services.words import print_json, print_lines

    # A spec's faults come first, whether or not the cluster answers.
    document = None if spec is None else load_spec(spec)
    remote = Remote(address)
    if document is not None:
        submitted = remote.start(document, name=name, directory=directory)
    else:
        submitted = remote.resume(resume or "", trials=trials)
    if detach:
        if as_json:
            print_json({"sweep": submitted.sweep, "job": submitted.job, "address": submitted.address})
        else:
            print_lines("sweep", [submitted.sweep])
            print_lines("job", [submitted.job])
            print_lines("follow", [submitted.follow])
            print_lines("stop", [submitted.stop])
        return 0
    click.echo(f"sweep {submitted.sweep} is the Ray job {submitted.job} at {submitted.address}", err=True)
    return _followed(remote, submitted, as_json=as_json)


def _followed(remote: Remote, submitted: Submitted, *, as_json: bool) -> int:
    log = JobLog(lambda line: click.echo(line, err=True))
    try:
        details = remote.follow(submitted, log)
    except KeyboardInterrupt:
        click.echo("\nno longer followed; the sweep goes on", err=True)
        click.echo(f"  follow  {submitted.follow}\n  stop    {submitted.stop}", err=True)
        return 128 + signal.SIGINT
    print_outcome(log, submitted, as_json=as_json, expected=details.driver_exit_code == 0)
    return exit_code(details, submitted, log)


def print_outcome(log: JobLog, submitted: Submitted, *, as_json: bool, expected: bool) -> None:
    """Prints what a log has of an outcome on stdout; where that is not all that was asked for, says so on stderr."""
    from services.words import print_json

    if as_json and log.outcome is not None:
        print_json(log.outcome)
    elif not as_json and log.words is not None:
        click.echo(log.words)
    elif expected or log.outcome is not None:
        click.echo(f"the job has ended, but its outcome could not be read here; see `{submitted.follow}`", err=True)


def exit_code(details: Any, submitted: Submitted, log: JobLog) -> int:
    """The driver's exit code; where it has none, says why."""
    code = details.driver_exit_code
    if details.status.value == "STOPPED":
        if log.outcome is None:
            click.echo(f"the Ray job was stopped; go on with `{submitted.resume}`", err=True)
        return 128 + signal.SIGTERM
    if code is None:
        why = ray_client.brief(details.message or "for no reason that Ray tells")
        raise ClusterError(
            f"the Ray job {submitted.job} must come to its end; it failed: {why}; if the sweep had begun, go on with "
            f"`{submitted.resume}`"
        )
    if code == ray_client.NOT_FOUND:
        raise ClusterError(
            "lora-sweeps must be on the PATH of the cluster's head; it is not: start Ray there in the environment that "
            "has it"
        )
    if code < 0:
        click.echo(f"the driver was killed by {signal.Signals(-code).name}; go on with `{submitted.resume}`", err=True)
        return 128 - int(code)
    return int(code)
