"""`run --address http://HEAD:8265`: sweeps as Ray jobs on a real head behind a token, followed from here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from services.cli import cli
from services.job_log import BEGIN, JobLog
from services.remote_run import Remote, Submitted, exit_code
from sweeps.errors import ClusterError, InputError
from sweeps.ledger import Ledger
from sweeps.records import SweepRecord, read_sweep
from tests.services.ray_support import TINY, Head, ray_head, ray_setting, until
from tests.support import command, environment, free_port

PYTHON_TASK = """\
import sys, time
from pathlib import Path

from sweeps.tasks.digits import DigitsTask


def make(*, cache, device, dtype, data, pause):
    assert Path(__file__).with_name(data).read_text() == "sent too"
    while "default_worker" in sys.argv[0] and not Path(pause).exists():  # the driver makes it too, and first
        time.sleep(0.05)
    return DigitsTask.load(0, cache=cache, device=device, dtype=dtype)
"""

PATIENCE_S = 300
"""Of a machine that has other work."""


@dataclass(frozen=True)
class Cluster:
    """A head, and where it keeps sweeps."""

    head: Head
    home: Path

    def start(self, *words: str | Path, cwd: Path, address: str | None = None, **env: str) -> subprocess.Popen[str]:
        """Starts `lora-sweeps run … --address HEAD` here, in a process group of its own."""
        return subprocess.Popen(
            command("run", *words, "--address", address or self.head.address),
            cwd=cwd,
            env=environment(**(self.head.settings | env)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str | Path, cwd: Path, **more: Any) -> tuple[int, str, str]:
        """Runs it to its end; returns the exit code, stdout and stderr."""
        process = self.start(*words, cwd=cwd, **more)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def record(self, sweep: str) -> SweepRecord | None:
        """What the head's ledger has of a sweep."""
        if not (self.home / "ledger.db").exists():
            return None
        with Ledger.in_directory(self.home) as ledger:
            return read_sweep(ledger, sweep) if any(one.id == sweep for one in ledger.sweeps()) else None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head whose environment says where sweeps are kept."""
    home = tmp_path_factory.mktemp("head") / "state of sweeps"
    with ray_head(LORA_SWEEPS_HOME=str(home)) as head:
        yield Cluster(head, home)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep that was run on the head and followed to its end, with --json."""
    cwd = tmp_path_factory.mktemp("laptop")
    (cwd / "tiny.yaml").write_text(TINY)
    code, out, err = cluster.run("tiny.yaml", "--json", cwd=cwd, MLFLOW_TRACKING_URI="http://me:canary@mlflow.invalid")
    assert code == 0, err
    return {"cwd": cwd, "outcome": json.loads(out), "stderr": err}


def submitted(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Waits until a sweep was submitted; returns its id and its job's."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.match(r"sweep (\S+) is the Ray job (\S+) at ", line):
            return found[1], found[2]
    raise AssertionError("".join(said))


def jobs(cluster: Cluster) -> dict[str, Any]:
    return {
        job.submission_id: job for job in JobSubmissionClient(cluster.head.address).list_jobs() if job.submission_id
    }


def test_a_sweep_runs_on_the_head_and_its_outcome_is_printed_here(cluster: Cluster, finished: dict[str, Any]):
    outcome, stderr = finished["outcome"], finished["stderr"]
    sweep = outcome["sweep"]
    assert outcome["trials"] == {"finished": 2, "pruned": 0, "diverged": 0, "failed": 0}
    assert stderr.index(f"sweep {sweep} is the Ray job {sweep}-1") < stderr.index("checking the spec against the model")
    assert BEGIN not in stderr, "the outcome is on stdout"
    record = cluster.record(sweep)
    assert record is not None
    assert record.state == "finished"
    assert Path(outcome["report"]).is_relative_to(cluster.home)
    assert outcome["mlflow"]["tracking_uri"] == f"sqlite:///{cluster.home / 'mlflow.db'}"
    assert not (finished["cwd"] / ".lora-sweeps").exists(), "nothing is kept here"


def test_nothing_that_ray_shows_of_a_job_holds_a_secret(cluster: Cluster, finished: dict[str, Any]):
    job = jobs(cluster)[f"{finished['outcome']['sweep']}-1"]
    assert job.metadata["lora_sweeps.sweep"] == finished["outcome"]["sweep"]
    assert job.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert cluster.head.token not in str(job)
    assert "canary" not in str(job) + finished["stderr"]
    assert "MLFLOW_TRACKING_URI is not sent, for it holds a secret" in finished["stderr"]


def test_a_finished_sweep_is_given_more_trials_through_the_address_of_ray_client(
    cluster: Cluster, finished: dict[str, Any]
):
    sweep = finished["outcome"]["sweep"]
    words = ("--resume", sweep, "--trials", "3")
    code, out, err = cluster.run(*words, cwd=finished["cwd"], address=cluster.head.client)
    assert code == 0, err
    assert re.search(rf"^sweep +{sweep}: finished", out)
    assert re.search("^trials +3: 3 finished", out, re.MULTILINE)
    assert f"is the Ray job {sweep}-2 at {cluster.head.address}\n" in err


@dataclass(frozen=True)
class Project:
    """A directory with a spec, code and data, whose workers wait until they are let go."""

    path: Path
    go: Path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    path = tmp_path / "project"
    (path / "specs").mkdir(parents=True)
    (path / "my_task.py").write_text(PYTHON_TASK)
    (path / "some.txt").write_text("sent too")
    (path / ".lora-sweeps").mkdir()
    (path / ".lora-sweeps" / "ray-token").write_text("canary")
    go = tmp_path / "go"
    options = json.dumps({"data": "some.txt", "pause": str(go)})
    task = f"task: {{type: python, entrypoint: 'my_task:make', path: .., options: {options}}}"
    (path / "specs" / "own.yaml").write_text(TINY.replace("task: {type: digits}", task).replace("tiny", "own"))
    return Project(path, go)


def begun(cluster: Cluster, sweep: str, job: str) -> SweepRecord:
    """Waits until a sweep trains."""

    def look() -> SweepRecord | None:
        assert not jobs(cluster)[job].status.is_terminal(), jobs(cluster)[job].message
        record = cluster.record(sweep)
        return record if record is not None and record.trials else None

    found: SweepRecord = until(look, patience_s=PATIENCE_S)
    return found


def test_a_sweep_that_nobody_follows_any_more_goes_on_to_its_end(cluster: Cluster, project: Project):
    process = cluster.start("specs/own.yaml", "--working-dir", ".", cwd=project.path)
    sweep, job = submitted(process)
    begun(cluster, sweep, job)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "no longer followed; the sweep goes on" in err
    assert f"ray job logs --follow --address {cluster.head.address} {job}" in err
    assert f"ray job stop --address {cluster.head.address} {job}" in err
    assert jobs(cluster)[job].status.value == "RUNNING"

    project.go.touch()
    until(lambda: jobs(cluster)[job].status.is_terminal(), patience_s=PATIENCE_S)
    record = cluster.record(sweep)
    assert record is not None
    assert record.state == "finished", jobs(cluster)[job].message
    copy = cluster.home / "uploads" / sweep
    assert record.spec.task.path == str(copy), "where a resumed sweep finds it again"
    assert not (copy / ".lora-sweeps").exists(), "what ran here is not sent"


def test_a_job_that_is_stopped_ends_in_order_and_its_sweep_is_resumed(cluster: Cluster, project: Project):
    words = ("specs/own.yaml", "--working-dir", project.path, "--name", "mine", "--detach", "--json")
    code, out, err = cluster.run(*words, cwd=project.path)
    assert code == 0, err
    told = json.loads(out)
    sweep, job = told["sweep"], told["job"]
    assert told["address"] == cluster.head.address
    assert sweep.startswith("mine-")
    begun(cluster, sweep, job)

    code, _, err = cluster.run("--resume", sweep, cwd=project.path)
    assert code == 2
    assert f"the Ray job {job} drives {sweep} now: follow it with `ray job logs --follow" in err

    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "--address", cluster.head.address, job]
    env = environment(**cluster.head.settings)
    subprocess.run(ray, env=env, check=True, capture_output=True, timeout=PATIENCE_S)
    until(lambda: jobs(cluster)[job].status.is_terminal(), patience_s=PATIENCE_S)
    assert jobs(cluster)[job].status.value == "STOPPED"
    record = cluster.record(sweep)
    assert record is not None
    assert (record.state, record.ended and record.ended.reason) == ("interrupted", "SIGTERM")

    project.go.touch()
    code, out, err = cluster.run("--resume", sweep, "--json", cwd=project.path)
    assert code == 0, err
    assert json.loads(out)["state"] == "finished"


def test_what_the_head_finds_wrong_is_told_here_and_nothing_is_left(cluster: Cluster, tmp_path: Path):
    (tmp_path / "-wrong.yaml").write_text(TINY.replace("fc1, fc2", "fc9").replace("tiny", "wrong"))
    code, out, err = cluster.run("./-wrong.yaml", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert re.search(r"^error: -wrong\.yaml:3: lora\.target_modules.*fc9", err, re.MULTILINE)
    assert not [path for path in (cluster.home / "uploads").iterdir() if path.name.startswith("wrong")]


def test_a_driver_in_a_job_of_the_users_own_keeps_nothing_where_ray_deletes(cluster: Cluster, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    client = JobSubmissionClient(cluster.head.address)
    env = {"working_dir": str(tmp_path), "env_vars": {"LORA_SWEEPS_HOME": ""}}
    job = client.submit_job(entrypoint="exec lora-sweeps run tiny.yaml --address auto", runtime_env=env)
    until(lambda: client.get_job_info(job).status.is_terminal(), patience_s=PATIENCE_S)
    assert client.get_job_info(job).driver_exit_code == 2
    assert "the state directory must outlive the Ray job that makes it" in client.get_job_logs(job)


def test_who_has_no_token_or_finds_no_head_is_told_so(cluster: Cluster):
    with ray_setting(**(cluster.head.settings | {"RAY_AUTH_TOKEN": "0" * 64})):
        with pytest.raises(ClusterError, match="Invalid authentication token") as caught:
            Remote(cluster.head.address)
        assert str(caught.value).endswith("set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) here")
    port = free_port()
    for address in (f"http://127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with ray_setting(), pytest.raises(ClusterError, match=f"the Ray cluster at {address} must answer"):
            Remote(address)


class Wire:
    """A way to a head that can be cut: a port of this machine that leads to another one."""

    def __init__(self, address: str) -> None:
        self._to = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := one.recv(65536):
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Ends every connection that there is."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it."""
        self.cut()
        self._server.shutdown(socket.SHUT_RDWR)
        for one in (self._server, *self._open):
            one.close()


def test_a_log_is_followed_on_after_the_connection_broke(cluster: Cluster, tmp_path: Path):
    wire, go, shown = Wire(cluster.head.address), tmp_path / "go", []

    def show(line: str) -> None:
        shown.append(line)
        if line == "one":
            wire.cut()
            go.touch()

    try:
        remote = Remote(wire.address)
        entrypoint = f"echo one; until [ -e {go} ]; do sleep 0.1; done; echo two"
        JobSubmissionClient(cluster.head.address).submit_job(entrypoint=entrypoint, submission_id="cut-1")
        details = remote.follow(Submitted("cut-1", wire.address, "cut"), JobLog(show))
    finally:
        wire.close()
    assert details.status.value == "SUCCEEDED"
    assert shown == ["one", "two"]


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 130, 130),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 143),
        (JobStatus.FAILED, None, "it failed: runtime_env setup failed: no such package; .* --resume own-1"),
        (JobStatus.FAILED, 127, "must be on the PATH of the cluster's head"),
    ],
)
def test_the_exit_code_is_the_drivers_and_a_job_that_has_none_says_why(
    status: JobStatus, code: int | None, told: int | str
):
    message = "runtime_env setup failed: no such package"
    details = JobDetails(type="SUBMISSION", status=status, driver_exit_code=code, message=message, entrypoint="x")
    submitted = Submitted("own-1-1", "http://head:8265", "own-1")
    with pytest.raises(ClusterError, match=told) if isinstance(told, str) else contextlib.nullcontext():
        assert exit_code(details, submitted, JobLog(lambda line: None)) == told


def refused(*words: str | Path, address: str = "http://127.0.0.1:9") -> str:
    """What is refused before any cluster is asked."""
    done = CliRunner().invoke(cli, ["run", *map(str, words), "--address", address])
    return str(done.exception) if isinstance(done.exception, InputError) else done.output


def test_what_can_be_found_wrong_here_is_not_sent(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "wrong.yaml").write_text(TINY.replace("steps: 4", "steps: -4"))
    assert "wrong.yaml:7: train.steps" in refused(tmp_path / "wrong.yaml")
    assert "must hold no password" in refused(tmp_path / "tiny.yaml", address="http://me:canary@head:8265")
    assert "go with --address http://HEAD:8265" in refused(tmp_path / "tiny.yaml", "--detach", address="auto")
    assert "a resumed sweep has its files" in refused("--resume", "x", "--working-dir", ".")
