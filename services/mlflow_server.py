"""An MLflow server beside the service, on loopback: started, kept running, found again, ended in order.

    leader     `python -m mlflow server`, which starts the web server and waits for it; both are one process group
    mlflow.lock  in the state directory: locked by the leader for as long as it lives, so that nobody needs to trust a
               process id; holds the leader's
    mark       in the environment of both, so that a web server whose leader was killed is known for ours

The server outlives a service that is killed, and the service's next start adopts it. Its database's URL may hold a
password, so it goes by the environment and never by the command line, which everybody on the machine can read.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from sweeps.errors import InputError, StateError, TrackingError
from sweeps.home import Home
from sweeps.secrecy import hide_passwords
from sweeps.tracking_address import absolute_uri, check_address, default_uri

_HOST = "127.0.0.1"

_MARK = "LORA_SWEEPS_MLFLOW"
_STORE = "MLFLOW_BACKEND_STORE_URI"

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its job runner would be six more processes, which no sweep needs
    "PYTHONSAFEPATH": "1",  # nothing is imported from the state directory
}

_NOT_PASSED_ON = (
    # Of MLflow, those that would make it another server than the one that is watched here.
    "MLFLOW_TRACKING_URI",
    "MLFLOW_STATIC_PREFIX",
    "MLFLOW_ARTIFACTS_ONLY",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT",
    "MLFLOW_GUNICORN_OPTS",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS",
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
)

_PATIENCE_S = 120.0
_STOP_S, _KILLED_S = 10.0, 5.0
_HEALTH_S = 2.0
_PORT_PATIENCE_S = 0.5

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STEADY_S = 60.0
"""A server that has lived this long has started well: the next pause is the first again."""

_LOG_BYTES = 10 * 2**20
_TAIL_LINES = 12

_log = logging.getLogger(__name__)


class MlflowServer:
    """One MLflow server for one state directory; not to be used from several threads at once.

    Attributes:
        restarts: how often `check` has started it again.
    """

    def __init__(
        self,
        home: Home,
        *,
        port: int = 5000,
        database: str | None = None,
        hosts: Sequence[str] = (),
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """Starts nothing yet.

        Args:
            home: where the lock, the log and the artifacts are, and the database unless another is named.
            port: of 127.0.0.1.
            database: the URL of a database for runs; None for a SQLite file in the state directory.
            hosts: what else browsers and clients may call the server, as a proxy in front of it passes it on in the
                Host header: with its port unless that is the scheme's own.
            patience_s: how long a start may take.

        Raises:
            InputError: the database or a host is not one.
        """
        self.restarts = 0
        self._home, self._port, self._patience_s = home, port, patience_s
        self._store = default_uri(home.path) if database is None else absolute_uri(database)
        self._lock = home.path / "mlflow.lock"
        self._log_file = home.path / "logs" / "mlflow.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._started_s = 0.0
        self._log_began = 0
        self._failures = 0
        self._again_s: float | None = None
        if self._store.startswith(("http://", "https://")):
            raise InputError(
                "an MLflow server keeps its runs in a database, as in postgresql://user@host/mlflow; found "
                f"{hide_passwords(self._store)!r}, a server; track there without one of our own"
            )
        for host in hosts:
            if host == "*" or not host or any(character in host for character in ",/ \t\n"):
                raise InputError(
                    f"a host of MLflow's must be a name as it stands in an address, as in mlflow.example.org; found "
                    f"{host!r}; name each"
                )
        self._command = _command(port, home.path / "mlartifacts", hosts)

    @property
    def uri(self) -> str:
        """The tracking URI, for clients on this machine."""
        return f"http://{_HOST}:{self._port}"

    def start(self) -> None:
        """Starts the server, or adopts the one that an earlier service left running; returns when it answers.

        One that was left running with other settings is ended first.

        Raises:
            InputError: the port is somebody else's.
            TrackingError: the database cannot be used, or the server does not answer in time.
        """
        if not (self._is_alive() and self._is_as_wanted()):
            self._end()
            self._check_port()
            check_address(self._store, None, ask_client=_ask_nobody)
            self._spawn()
        self._wanted, self._again_s = True, None
        self._wait_until_it_answers()

    def check(self) -> None:
        """Starts the server again where it has ended: after a second, and after longer and longer pauses.

        Waits for nothing; to be called about once a second.
        """
        if not self._wanted:
            return
        self._reap()
        if self._is_alive():
            return
        now_s = time.monotonic()
        if self._again_s is None:
            if now_s - self._started_s >= _STEADY_S:
                self._failures = 0
            pause_s = min(_FIRST_PAUSE_S * 2**self._failures, _LONGEST_PAUSE_S)
            self._failures += 1
            self._again_s = now_s + pause_s
            _send(self._processes(), signal.SIGKILL)  # a web server whose leader was killed would keep the port
            _log.warning("the MLflow server has ended; it is started again in %.0f s; see %s", pause_s, self._log_file)
        elif now_s >= self._again_s:
            self._again_s = None
            self._started_s = now_s
            try:
                self._spawn()
                self.restarts += 1
            except (OSError, StateError) as error:
                _log.warning("the MLflow server cannot be started: %s", error)

    def stop(self) -> None:
        """Ends the server, whoever started it: in order, and after 10 s without."""
        self._wanted = False
        self._end()

    # -- its processes -------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        """Starts the leader with the lock in its hands."""
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StateError(
                    f"a state directory has one MLflow server; another process holds {self._lock}; stop it"
                ) from None
            os.truncate(descriptor, 0)
            with self._open_log() as log:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=self._home.path,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C at the service's terminal is not for it
                    pass_fds=(descriptor,),
                )
            os.pwrite(descriptor, str(self._process.pid).encode(), 0)
        finally:
            os.close(descriptor)
        self._started_s = time.monotonic()

    def _environment(self) -> dict[str, str]:
        """The service's own, without its secrets and without what would make this another server."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _NOT_PASSED_ON and not name.startswith(("LORA_SWEEPS_", "RAY_"))
        }
        return kept | _SETTINGS | {_STORE: self._store, _MARK: str(self._lock)}

    def _open_log(self) -> IO[bytes]:
        self._log_file.parent.mkdir(mode=0o700, exist_ok=True)
        if self._log_file.exists() and self._log_file.stat().st_size > _LOG_BYTES:
            self._log_file.replace(self._log_file.with_suffix(".log.1"))
        log = open(os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")  # noqa: SIM115
        self._log_began = log.seek(0, os.SEEK_END)
        return log

    def _is_alive(self) -> bool:
        """Whether a leader lives: its lock is held."""
        try:
            with self._lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def _pid(self) -> int | None:
        """The leader's process id, whether it lives or not; None where it was not written down."""
        try:
            text = self._lock.read_text()
        except FileNotFoundError:
            return None
        return int(text) if text.isdecimal() else None

    def _is_as_wanted(self) -> bool:
        """Whether the leader was started with this command and database."""
        pid = self._pid()
        if pid is None:
            return False
        try:
            leader = psutil.Process(pid)
            return bool(leader.cmdline() == self._command and leader.environ().get(_STORE) == self._store)
        except psutil.Error:
            return False

    def _processes(self) -> set[psutil.Process]:
        """Every process of the server, also where the leader is gone; a process id alone proves nothing."""
        if not self._lock.exists():
            return set()
        group = self._pid()
        found = set()
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if group is None or os.getpgid(pid) == group:
                    process = psutil.Process(pid)
                    if process.environ().get(_MARK) == str(self._lock):
                        found.add(process)
        return found

    def _end(self) -> None:
        """Ends every process of the server; one that has been told to may have just started another."""
        told: set[psutil.Process] = set()
        began_s = time.monotonic()
        for number, until_s in ((signal.SIGTERM, began_s + _STOP_S), (signal.SIGKILL, began_s + _STOP_S + _KILLED_S)):
            _send(told, number)
            while time.monotonic() < until_s:
                new = self._processes() - told
                _send(new, number)
                told = {process for process in told | new if _lives(process)}
                self._reap()
                if not told and not self._is_alive():
                    return
                time.sleep(0.02)

    def _reap(self) -> None:
        """Takes note of the end of a leader of our own, which would stay as a zombie otherwise."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    # -- its start -----------------------------------------------------------------------------------------------------

    def _check_port(self) -> None:
        deadline_s = time.monotonic() + _PORT_PATIENCE_S
        while True:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((_HOST, self._port))
                    return
                except OSError as error:
                    cause = error.strerror
            # A server of ours that was just ended may take a moment to let go of it.
            if time.monotonic() > deadline_s:
                raise InputError(
                    f"the MLflow server needs a port of {_HOST} to itself; {self._port} cannot be had: {cause}; choose "
                    "another, or stop what uses it"
                )
            time.sleep(0.05)

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + self._patience_s
        while not self._answers():
            alive = self._is_alive()
            if alive and time.monotonic() < deadline_s:
                time.sleep(0.1)
                continue
            self.stop()
            what = f"does not answer within {self._patience_s:.0f} s" if alive else "has ended"
            tail = self._tail()
            raise TrackingError(
                f"the MLflow server must answer at {self.uri}; it {what}; see {self._log_file}, where it last said"
                + (f":\n{tail}" if tail else " nothing")
            )

    def _answers(self) -> bool:
        # Without a proxy, whatever the environment says: it is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.uri}/health", timeout=_HEALTH_S) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _tail(self) -> str:
        """The last that this start wrote, without secrets."""
        try:
            with self._log_file.open("rb") as file:
                file.seek(self._log_began)
                text = file.read(_LOG_BYTES).decode(errors="replace")
        except OSError:
            return ""
        return hide_passwords("\n".join(text.splitlines()[-_TAIL_LINES:]))


def _send(processes: set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _lives(process: psutil.Process) -> bool:
    """Whether a process may still do something: one that is ending loses its environment before its files."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _command(port: int, artifacts: Path, hosts: Sequence[str]) -> list[str]:
    """MLflow compares a Host header with each allowed host as a whole, its port included."""
    words = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1"]
    words += ["--serve-artifacts", "--artifacts-destination", str(artifacts)]
    words += ["--allowed-hosts", ",".join((f"localhost:{port}", f"{_HOST}:{port}", *hosts))]
    if hosts:
        # A page served under another name than localhost may not write unless its origin is named as well.
        words += [
            "--cors-allowed-origins",
            ",".join(f"{scheme}://{host}" for host in hosts for scheme in ("https", "http")),
        ]
    return [*words, "--uvicorn-opts", "--log-level warning"]  # no line for every request


def _ask_nobody(uri: str, experiment: str, answer: str) -> None:
    raise AssertionError("only servers are asked through a client, and this is a database")
