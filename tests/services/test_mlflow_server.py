"""MLflow beside the service: a real server, killed, adopted and ended."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.mlflow_server import MlflowServer
from sweeps.errors import InputError, TrackingError
from sweeps.home import Home
from tests.support import free_port

PASSWORD = "canary-7c1f"


def processes_of(home: Home) -> set[int]:
    """Every process that was started for a state directory."""
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).environ().get("LORA_SWEEPS_MLFLOW") == str(home.path / "mlflow.lock"):
                found.add(pid)
    return found


def until(condition: Callable[[], Any], *, patience_s: float = 60) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.05)


def answer(uri: str, path: str = "/", *, data: bytes | None = None, **headers: str) -> int:
    """The status with which a server answers."""
    request = urllib.request.Request(uri + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def answers(uri: str) -> bool:
    try:
        return answer(uri, "/health") == 200
    except (OSError, urllib.error.URLError):
        return False


def make_home(path: Path) -> Home:
    path.mkdir(mode=0o700)
    return Home(path)


@contextlib.contextmanager
def ended_at_last(home: Home) -> Iterator[None]:
    try:
        yield
    finally:
        for pid in processes_of(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL that wants a password; yields the URL of its database."""
    port = free_port()
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    become: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="postgres-") as scratch:
        secret = Path(scratch, "password")
        secret.write_text(PASSWORD)
        data = Path(scratch, "data")
        if become:
            shutil.chown(scratch, user)
            shutil.chown(secret, user)
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": scratch, **become}
        words = ["--pgdata", str(data), "--username=ann", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        subprocess.run(["initdb", *words], check=True, **options)
        words = ["-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", scratch, "-F"]
        process = subprocess.Popen(["postgres", *words], **options)
        try:
            until(lambda: accepts(port))
            yield f"postgresql+psycopg://ann:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait()


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server for all tests of this file, on PostgreSQL where there is one."""
    home = make_home(tmp_path_factory.mktemp("beside") / "state of sweeps")
    database = contextlib.nullcontext() if shutil.which("initdb") is None else postgres()
    with database as url, ended_at_last(home), pytest.MonkeyPatch.context() as patch:
        # What a service may have in its environment, and its MLflow must not follow or know.
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        patch.setenv("MLFLOW_STATIC_PREFIX", "/elsewhere")
        patch.setenv("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "true")
        patch.setenv("LORA_SWEEPS_DATABASE", "postgresql://somebody:canary-of-the-ledger@127.0.0.1/sweeps")
        server = MlflowServer(home, port=free_port(), database=url, hosts=["mlflow.example.org"])
        yield server
        server.stop()


@pytest.fixture
def server(shared: MlflowServer) -> MlflowServer:
    """The same server, running: started by the first test, adopted by others."""
    shared.start()
    return shared


def again(server: MlflowServer) -> MlflowServer:
    """The same server, as a service finds it that was killed and started again."""
    return MlflowServer(
        server._home,
        port=server._port,
        database=None if "sqlite" in server._store else server._store,
        hosts=["mlflow.example.org"],
    )


def home_of(server: MlflowServer) -> Home:
    return server._home


def port_of(server: MlflowServer) -> str:
    return server.uri.rpartition(":")[2]


def test_it_answers_to_its_names_only(server: MlflowServer):
    port = port_of(server)
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "mlflow.example.org"):
        assert answer(server.uri, Host=host) == 200
    for host in ("evil.example.org", f"mlflow.example.org:{port}", "localhost", f"127.0.0.1:{port}.example.org"):
        assert answer(server.uri, Host=host) == 403


def test_its_page_may_write_under_each_of_its_names_and_no_other_page_may(server: MlflowServer):
    def search(host: str, origin: str) -> int:
        query = json.dumps({"max_results": 1}).encode()
        headers = {"Content-Type": "application/json", "Host": host, "Origin": origin}
        return answer(server.uri, "/api/2.0/mlflow/experiments/search", data=query, **headers)

    port = port_of(server)
    assert search(f"localhost:{port}", f"http://localhost:{port}") == 200
    assert search("mlflow.example.org", "https://mlflow.example.org") == 200
    assert search("mlflow.example.org", "https://evil.example.org") == 403


def test_it_listens_on_loopback_and_keeps_its_things_in_the_state_directory(server: MlflowServer):
    home = home_of(server)
    connections = [one for pid in processes_of(home) for one in psutil.Process(pid).net_connections("inet")]
    listening = {one.laddr[0] for one in connections if one.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow-artifacts/artifacts/a/note.txt", data=b"kept", method="PUT"
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status == 200
    assert (home.path / "mlartifacts" / "a" / "note.txt").read_bytes() == b"kept"
    assert (home.path / "logs" / "mlflow.log").stat().st_mode & 0o777 == 0o600
    assert (home.path / "mlflow.lock").stat().st_mode & 0o777 == 0o600


def test_it_knows_no_secret_of_the_service(server: MlflowServer):
    pids = processes_of(home_of(server))
    assert pids
    for pid in pids:
        assert "canary-of-the-ledger" not in str(psutil.Process(pid).environ())


def test_a_service_that_was_killed_finds_its_server_again(server: MlflowServer):
    before = processes_of(home_of(server))
    second = again(server)
    second.start()
    second.check()
    assert processes_of(home_of(server)) == before
    assert len(before) == 2


def test_a_killed_server_is_started_again_without_anybody_waiting(server: MlflowServer):
    home, restarts = home_of(server), server.restarts
    before = processes_of(home)
    (leader,) = [pid for pid in before if os.getpgid(pid) == pid]
    os.kill(leader, signal.SIGKILL)  # its web server lives on, and has the port
    slowest_s = 0.0
    deadline_s = time.monotonic() + 60
    while server.restarts == restarts or not answers(server.uri):
        began_s = time.perf_counter()
        server.check()
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert server.restarts == restarts + 1
    assert slowest_s < 0.5  # it takes seconds to start
    print(f"the slowest check took {1000 * slowest_s:.1f} ms")
    assert len(processes_of(home)) == 2
    assert not processes_of(home) & before


@pytest.mark.skipif(shutil.which("initdb") is None, reason="needs PostgreSQL's initdb on the PATH")
def test_the_password_of_its_database_is_seen_nowhere(server: MlflowServer):
    query = json.dumps({"name": "kept"}).encode()
    path = "/api/2.0/mlflow/experiments/create"
    assert answer(server.uri, path, data=query, **{"Content-Type": "application/json"}) == 200
    home = home_of(server)
    pids = processes_of(home)
    assert len(pids) == 2
    for pid in pids:
        assert PASSWORD in psutil.Process(pid).environ()["MLFLOW_BACKEND_STORE_URI"]  # that is how it is told
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            assert PASSWORD.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert home.path / "logs" / "mlflow.log" in files
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]


def test_a_server_with_other_settings_is_ended_and_started_anew_and_stop_leaves_nothing(server: MlflowServer):
    home = home_of(server)
    before = processes_of(home)
    other = MlflowServer(home, port=free_port())
    other.start()
    after = processes_of(home)
    assert len(after) == 2
    assert not after & before
    assert not answers(server.uri)
    assert answers(other.uri)
    assert (home.path / "mlflow.db").exists()

    # Adopted, and ended by who did not start it.
    once_more = MlflowServer(home, port=int(port_of(other)))
    once_more.start()
    assert processes_of(home) == after
    once_more.stop()
    assert processes_of(home) == set()
    until(lambda: not answers(other.uri))
    once_more.check()
    once_more.stop()
    assert processes_of(home) == set()
    other.stop()
    server.stop()  # nothing, but that it takes note


def test_a_port_of_somebody_else_is_left_to_them(tmp_path: Path):
    home = make_home(tmp_path / "home")
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        with pytest.raises(InputError, match=f"{port} cannot be had: Address already in use; choose another"):
            MlflowServer(home, port=port).start()
    assert processes_of(home) == set()


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = make_home(tmp_path / "home")
    monkeypatch.setenv("MLFLOW_UVICORN_OPTS", "--ignored, for the command line has its own")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with (
        ended_at_last(home),
        pytest.raises(TrackingError, match=r"it has ended; see .*mlflow.log, .*:\n(.|\n)*encodings"),
    ):
        MlflowServer(home, port=free_port()).start()
    assert processes_of(home) == set()


def test_a_server_that_takes_too_long_is_ended(tmp_path: Path):
    home = make_home(tmp_path / "home")
    with ended_at_last(home), pytest.raises(TrackingError, match="it does not answer within 0 s"):
        MlflowServer(home, port=free_port(), patience_s=0.2).start()
    assert processes_of(home) == set()


@pytest.mark.parametrize("host", ["*", "", "a,b", "https://mlflow.example.org", "a b"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str):
    with pytest.raises(InputError, match="a host of MLflow's must be a name"):
        MlflowServer(Home(tmp_path), hosts=[host])


def test_a_database_that_is_none_is_refused_without_its_password(tmp_path: Path):
    home = make_home(tmp_path / "home")
    with pytest.raises(InputError, match="keeps its runs in a database") as refused:
        MlflowServer(home, database=f"http://somebody:{PASSWORD}@127.0.0.1:5000")
    assert PASSWORD not in str(refused.value)
    for uri in (f"postgresql+psycopg://somebody:{PASSWORD}@127.0.0.1:1/mlflow", f"redis://:{PASSWORD}@127.0.0.1/0"):
        with pytest.raises(TrackingError, match=r"must (name|be)") as refused:
            MlflowServer(home, port=free_port(), database=uri).start()
        assert PASSWORD not in str(refused.value)
