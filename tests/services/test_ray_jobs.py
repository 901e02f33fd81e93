"""Drivers as Ray jobs, on a real head behind a token; a small script stands in for the driver."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shlex
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.ray_jobs import RayJobsRunner, drive_command
from sweeps.errors import ClusterError, InputError, StateError
from sweeps.home import Home
from tests.services import service_support
from tests.services.ray_support import ray_head, ray_setting, until
from tests.support import free_port

STAND_IN = """\
import json, os, signal, sys, time
from pathlib import Path

sweep, folder = sys.argv[1], Path(sys.argv[2])

def end(number, frame):
    if sweep.startswith("stubborn"):
        return
    time.sleep(4)  # longer than Ray waits unless it is told to
    (folder / "in-order").touch()
    sys.exit(130)

signal.signal(signal.SIGTERM, end)
print("driving", sweep, flush=True)
shown = {name: value for name, value in os.environ.items() if name.startswith(("LORA_SWEEPS", "MLFLOW"))}
(folder / "new").write_text(json.dumps({"pid": os.getpid(), "environment": shown}))
(folder / "new").rename(folder / "started")
if sweep.startswith("failing"):
    sys.exit(3)
while not (folder / "go").exists():
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The dashboard's address of a head, whose token this process has."""
    with ray_head() as one:
        yield one.address


class Place:
    """A state directory, and the stand-in that is started in place of a driver."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.home = Home(folder / "state of sweeps")
        self.script = folder / "stand_in.py"
        self.script.write_text(STAND_IN)

    def command(self, sweep: str) -> str:
        return shlex.join([sys.executable, str(self.script), sweep, str(self.folder)])

    def runner(self, **changes: Any) -> RayJobsRunner:
        return RayJobsRunner(self.address, self.home, **({"command": self.command} | changes))

    def started(self) -> dict[str, Any]:
        until(lambda: (self.folder / "started").exists())
        found: dict[str, Any] = json.loads((self.folder / "started").read_text())
        return found


@pytest.fixture
def place(head: str, tmp_path: Path) -> Place:
    return Place(head, tmp_path)


def answer_not_found(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Answers as Ray does when asked for its version, and as a proxy without a backend does otherwise."""
    body = b'{"ray_version": "2.60.0"}' if handler.path == "/api/version" else b"default backend - 404"
    handler.send_response(200 if handler.path == "/api/version" else 404)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def quiet(handler: http.server.BaseHTTPRequestHandler, *arguments: Any) -> None:
    """Logs nothing."""


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_a_driver_is_found_by_who_lost_its_handle_and_ends_in_order_with_time_to_do_so(place: Place):
    handle = place.runner().start("orderly-1")
    assert handle == "orderly-1-1"
    pid = place.started()["pid"]

    # A second runner is the service after its own restart.
    runner = place.runner()
    assert runner.find("orderly-1", handle) == handle
    assert runner.find("orderly-1", "") == handle
    assert runner.find("orderly-1", "orderly-1-99") == handle
    assert runner.find("orderly", "") is None
    assert runner.ended("orderly-1", handle) is None
    with pytest.raises(StateError, match="the Ray job orderly-1-1 drives orderly-1 now: wait for it or stop it"):
        runner.start("orderly-1")

    runner.interrupt("orderly-1", handle)
    ending = until(lambda: runner.ended("orderly-1", handle))
    assert ending.reason == "the Ray job was stopped"
    assert (place.folder / "in-order").exists()
    assert not is_alive(pid)
    assert runner.find("orderly-1", handle) is None
    assert runner.find("orderly-1", "") is None
    runner.interrupt("orderly-1", handle)  # nothing, now that it has ended
    runner.kill("orderly-1", handle)


def test_a_driver_that_does_not_end_in_order_is_killed(place: Place):
    runner = place.runner(grace_s=1)
    handle = runner.start("stubborn-1")
    pid = place.started()["pid"]
    runner.kill("stubborn-1", handle)
    until(lambda: runner.ended("stubborn-1", handle))
    until(lambda: not is_alive(pid))
    assert not (place.folder / "in-order").exists()


def test_a_second_attempt_is_a_job_of_its_own_and_an_ending_says_how(place: Place):
    runner = place.runner()
    first = runner.start("failing-1")
    assert until(lambda: runner.ended("failing-1", first)).reason == "exit code 3"
    (place.folder / "started").unlink()
    second = runner.start("failing-1")
    assert (first, second) == ("failing-1-1", "failing-1-2")
    until(lambda: runner.ended("failing-1", second))
    log = place.home.logs("failing-1")
    assert log.read_text().splitlines() == ["driving failing-1"] * 2
    assert stat.S_IMODE(log.stat().st_mode) == 0o600

    absent = place.runner(command=lambda sweep: "no-such-program").start("absent-1")
    ending = until(lambda: runner.ended("absent-1", absent))
    assert ending.reason == "exit code 127: its program is not on the PATH of the cluster's head"

    # What the shell itself says is in no log of ours.
    wrong = place.runner(command=lambda sweep: "(").start("wrong-1")
    ending = until(lambda: runner.ended("wrong-1", wrong))
    assert ending.reason.startswith("exit code 2: ")
    assert "yntax error" in ending.reason


def test_a_killed_driver_and_one_that_comes_to_its_end_say_so(place: Place):
    runner = place.runner()
    handle = runner.start("killed-1")
    os.kill(place.started()["pid"], signal.SIGKILL)
    assert until(lambda: runner.ended("killed-1", handle)).reason == "killed by SIGKILL"
    (place.folder / "started").unlink()
    handle = runner.start("killed-1")
    place.started()
    (place.folder / "go").touch()
    assert until(lambda: runner.ended("killed-1", handle)).reason == "exit code 0"


def test_a_job_that_the_cluster_does_not_know_has_ended(place: Place):
    runner = place.runner()
    ending = runner.ended("gone-1", "gone-1-1")
    assert ending is not None
    assert ending.reason == "the Ray cluster knows the job no longer: its head was started anew"
    assert runner.find("gone-1", "gone-1-1") is None
    runner.interrupt("gone-1", "gone-1-1")


def test_a_driver_is_told_where_things_are_but_no_secret(place: Place, monkeypatch: pytest.MonkeyPatch):
    database = place.folder / "database-url"
    monkeypatch.setenv("LORA_SWEEPS_DATABASE_FILE", str(database))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:canary@127.0.0.1:5000")
    runner = place.runner()
    handle = runner.start("told-1")
    told = place.started()["environment"]
    assert told == {"LORA_SWEEPS_HOME": str(place.home.path), "LORA_SWEEPS_DATABASE_FILE": str(database)}
    (place.folder / "go").touch()
    until(lambda: runner.ended("told-1", handle))

    (place.folder / "started").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    handle = runner.start("told-1")
    assert place.started()["environment"] == told | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    until(lambda: runner.ended("told-1", handle))


def test_nobody_gets_in_without_the_token(place: Place):
    for settings, found in [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "/nowhere"),
        ({}, "Missing authentication token"),
    ]:
        with ray_setting(**settings), pytest.raises(ClusterError, match=found) as caught:
            place.runner().start("stranger-1")
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in str(caught.value)
    assert place.runner().find("stranger-1", "") is None
    assert not (place.folder / "started").exists()


def test_a_head_that_does_not_answer_is_not_taken_for_a_driver_that_ended(tmp_path: Path):
    port = free_port()
    with ray_setting():
        runner = RayJobsRunner(f"http://127.0.0.1:{port}", Home(tmp_path))
        for ask in (
            lambda: runner.start("digits-1"),
            lambda: runner.find("digits-1", "digits-1-1"),
            lambda: runner.ended("digits-1", "digits-1-1"),
            lambda: runner.interrupt("digits-1", "digits-1-1"),
        ):
            with pytest.raises(ClusterError, match=f"the Ray cluster at http://127.0.0.1:{port} must answer"):
                ask()


def test_a_proxy_whose_head_is_away_is_not_taken_for_a_driver_that_ended(tmp_path: Path):
    handler = type("NotHere", (http.server.BaseHTTPRequestHandler,), {"do_GET": answer_not_found, "log_message": quiet})
    with ray_setting(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        runner = RayJobsRunner(f"http://127.0.0.1:{proxy.server_port}", Home(tmp_path))
        with pytest.raises(ClusterError, match="404"):
            runner.ended("digits-1", "digits-1-1")
        proxy.shutdown()


def test_a_head_that_never_says_a_word_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.ray_client.TIMEOUT_S", (0.5, 0.5))
    with ray_setting(), socket.create_server(("127.0.0.1", 0)) as silent:
        runner = RayJobsRunner(f"http://127.0.0.1:{silent.getsockname()[1]}", Home(tmp_path))
        with pytest.raises(ClusterError, match="timed out"):
            runner.ended("digits-1", "digits-1-1")


def test_what_would_send_jobs_or_secrets_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "LORA_SWEEPS_DATABASE", "LORA_SWEEPS_DATABASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    home = Home(tmp_path)
    with pytest.raises(InputError, match="as in http://head:8265; found 'head:6379'"):
        RayJobsRunner("head:6379", home)
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "auto")
        with pytest.raises(InputError, match=r"found RAY_ADDRESS, .* unset it for the service"):
            RayJobsRunner("http://head:8265", home)
    monkeypatch.setenv("LORA_SWEEPS_DATABASE", "postgresql://somebody:canary@host/sweeps")
    with pytest.raises(InputError, match=r"into a file that all nodes see, .* LORA_SWEEPS_DATABASE_FILE") as caught:
        RayJobsRunner("http://head:8265", home)
    assert "canary" not in str(caught.value)


def test_a_driver_runs_on_the_cluster_that_its_job_runs_on():
    assert drive_command("digits-c16ad5") == "lora-sweeps drive digits-c16ad5 --address auto"
    assert shlex.split(drive_command("x; true")) == ["lora-sweeps", "drive", "x; true", "--address", "auto"]


def test_a_service_runs_a_sweep_as_a_ray_job_and_finds_it_again_after_it_was_killed(head: str, tmp_path: Path):
    from ray.job_submission import JobSubmissionClient

    home = tmp_path / "home"
    options = ("--ray-address", head, "--devices", "1")
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    served = service_support.start(home, *options, **ray)
    try:
        sweep = served.submit()
        served.wait_for(sweep, "running", "finished")
        served.process.kill()
        served.process.communicate()
        served = service_support.start(home, *options, **ray)
        status = served.wait_for(sweep, "finished", "failed", "paused")
        assert (status["state"], status["reason"]) == ("finished", "")
        assert status["trials"]["finished"] == 4
        assert status["ray_url"] == head
        jobs = [str(job.submission_id) for job in JobSubmissionClient(head).list_jobs()]
        assert [job for job in jobs if job.startswith(sweep)] == [f"{sweep}-1"]
    finally:
        served.process.kill()
        served.process.communicate()
