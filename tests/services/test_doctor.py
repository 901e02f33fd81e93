"""`lora-sweeps doctor`, for real: on this machine, before real servers, and on a cluster one of whose nodes is ill."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeps.ledger import Ledger
from tests.postgres_support import postgresql
from tests.support import command, environment, free_port, run_cli
from tests.sweeps.hf_support import make_gpt2
from tests.sweeps.mlflow_support import server

_PATIENCE_S = 180

SPEC = """\
name: looked-at
task: {type: causal_lm, model: /no/such/model, data: {train: ./train.jsonl}}
lora: {target_modules: [c_attn]}
parameters: {rank: {values: [2, 4]}, lr: {min: 1e-4, max: 1e-2}, alpha: {values: [4, 8]}}
compute: {workers: 1, gpus_per_worker: 0}
"""


def examined(*arguments: str, cwd: Path, **env: str) -> dict[str, dict[str, dict[str, str]]]:
    """What doctor says, by node and name. Its exit code must go with it, and it must end without a traceback."""
    done = run_cli("doctor", "--json", *arguments, cwd=cwd, **env)
    assert "Traceback" not in done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (2 if told["summary"]["failed"] else 0), done.stderr
    assert sum(told["summary"].values()) == len(told["checks"])
    found: dict[str, dict[str, dict[str, str]]] = {}
    for check in told["checks"]:
        assert bool(check["way_out"]) == (check["status"] in ("warning", "failed")), check
        found.setdefault(check["node"], {})[check["name"]] = check
    return found


def left_in(directory: Path) -> list[str]:
    """What a probe may have left below a directory."""
    return [str(path) for path in directory.rglob("*") if "probe" in path.name or "doctor" in path.name]


# -- this machine ------------------------------------------------------------------------------------------------------


def test_this_machine_is_examined_and_nothing_is_left(tmp_path: Path):
    found = examined(cwd=tmp_path)
    for name in ("checkpoints", "ledger", "MLflow", "artifacts"):
        assert found[""][name]["status"] == "ok", found[""][name]
    assert "SQLite" in found[""]["ledger"]["found"]
    assert "Ray" not in found[""]
    assert found["this machine"]["versions"]["status"] == "ok"
    assert "open files" in found["this machine"]
    assert not left_in(tmp_path)
    assert not (tmp_path / "mlflow.db").exists()


def test_it_is_a_table_for_people(tmp_path: Path):
    done = run_cli("doctor", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "this machine"
    assert "for all" in lines
    assert lines[-1].split(",")[0].endswith(" ok")
    assert "looking at this machine" in done.stderr


def test_a_spec_is_checked_and_what_it_reads_is_looked_for(tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    found = examined("spec.yaml", cwd=tmp_path)
    here = found["this machine"]
    assert here["task.model"]["status"] == "failed"
    assert "/no/such/model is not there" in here["task.model"]["found"]
    assert here["model's config"]["status"] == "failed"
    assert here["task.data.train"]["status"] == "ok"


def test_a_tokenizer_must_be_one_that_can_be_loaded(tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(SPEC.replace("/no/such/model", "./model"))
    (tmp_path / "train.jsonl").write_text('{"text": "a b c"}\n{"text": "b c d"}\n')
    tokenizer = make_gpt2(tmp_path / "model", layers=1) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:1000])
    here = examined("spec.yaml", cwd=tmp_path)["this machine"]
    assert here["task.model"]["status"] == "ok"  # as far as names tell
    assert here["model's tokenizer"]["status"] == "failed"
    assert "required a model with its tokenizer beside it" in here["model's tokenizer"]["found"]


def test_a_spec_with_a_fault_is_refused_as_by_every_command(tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(SPEC.replace("rank:", "rnk:"))
    done = run_cli("doctor", "spec.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "spec.yaml:4: parameters.rnk" in done.stderr


def test_a_readable_token_fails(tmp_path: Path):
    (tmp_path / ".lora-sweeps").mkdir(mode=0o700)
    (tmp_path / ".lora-sweeps" / "ray-token").write_text("secret")
    (tmp_path / ".lora-sweeps" / "ray-token").chmod(0o644)
    check = examined(cwd=tmp_path)[""]["Ray's token"]
    assert check["status"] == "failed"
    assert "0644" in check["found"]


# -- ledger and MLflow -------------------------------------------------------------------------------------------------


def test_a_postgresql_is_written_to_and_rolled_back(tmp_path: Path):
    with postgresql(tmp_path / "server") as url:
        found = examined(cwd=tmp_path, LORA_SWEEPS_DATABASE=url)
        with contextlib.closing(Ledger(url)) as ledger:
            assert ledger.sweeps() == []
    check = found[""]["ledger"]
    assert check["status"] == "ok"
    assert "PostgreSQL 1" in check["found"]
    assert "ms a query" in check["found"]
    assert ":***@" in check["found"]


def test_servers_that_are_away_fail_with_the_way_out(tmp_path: Path):
    port = free_port()
    found = examined(
        cwd=tmp_path,
        LORA_SWEEPS_DATABASE=f"postgresql://me:hunter2@127.0.0.1:{port}/sweeps",
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}",
    )[""]
    assert found["ledger"]["status"] == found["MLflow"]["status"] == "failed"
    assert "hunter2" not in str(found)
    assert "mlflow server" in found["MLflow"]["way_out"]
    assert found["artifacts"]["status"] == "skipped"


def test_an_mlflow_server_tells_its_version_and_takes_an_artifact(tmp_path: Path):
    with server(tmp_path / "mlflow.db", free_port()) as address:
        found = examined(cwd=tmp_path, MLFLOW_TRACKING_URI=address)[""]
    assert found["MLflow"]["status"] == "ok"
    assert found["MLflow"]["found"].startswith("version 3.")
    assert found["artifacts"]["status"] == "ok", found["artifacts"]
    assert not left_in(tmp_path / "served")


def test_a_tracking_uri_that_is_none_is_a_failed_check(tmp_path: Path):
    found = examined(cwd=tmp_path, MLFLOW_TRACKING_URI="http://[bad")[""]
    assert found["MLflow"]["status"] == "failed"
    assert "http://[bad" in found["MLflow"]["found"]
    assert found["artifacts"]["status"] == "skipped"


# -- a cluster ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["http://head:8265", "https://head", "ray://head:10001"])
def test_an_address_to_submit_jobs_to_is_refused_with_the_way_out(address: str, tmp_path: Path):
    done = run_cli("doctor", "--address", address, cwd=tmp_path)
    assert done.returncode == 2
    assert f"found {address}" in done.stderr
    assert "run it on the head with --address auto" in done.stderr
    assert not done.stdout


def test_an_address_where_nothing_listens_is_a_failed_check(tmp_path: Path):
    found = examined("--address", f"127.0.0.1:{free_port()}", cwd=tmp_path)
    assert found[""]["Ray"]["status"] == "failed"
    assert "does not answer" in found[""]["Ray"]["found"]


def test_ctrl_c_ends_it_quietly(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            command("doctor", "--address", f"127.0.0.1:{silent.getsockname()[1]}"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("connecting"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 130
    assert "stopped" in err
    assert "Traceback" not in err
    assert out == ""


def hidden(directory: Path) -> list[str]:
    """Words before a command that does not see a directory, but an empty one; skips where they are not permitted."""
    words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(directory)]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounts in a namespace of their own are not permitted: {tried.stderr.strip()}")
    return words


@contextlib.contextmanager
def two_nodes(inside: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A head with a CPU, and a node, started by some words, that claims two GPUs; yields what a driver needs."""
    mark, port = f"TESTS_DOCTOR={secrets.token_hex(8)}", free_port()
    name, _, value = mark.partition("=")
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        env = environment(**access, **{name: value}, RAY_TMPDIR=scratch, RAY_USAGE_STATS_ENABLED="0")
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory", str(2**27)]
        start += ["--min-worker-port", "0", "--max-worker-port", "0", "--num-cpus", "1"]
        head = ["--head", "--port", str(port), "--include-dashboard", "false", "--node-ip-address", "127.0.0.1"]
        node = ["--address", f"127.0.0.1:{port}", "--node-ip-address", "127.0.0.2", "--num-gpus", "2"]
        try:
            for words in ([*start, *head, "--ray-client-server-port", str(free_port())], [*inside, *start, *node]):
                log = Path(scratch, f"{len(processes)}.log")
                with log.open("wb") as said:
                    processes.append(subprocess.Popen(words, env=env, stdout=said, stderr=said, start_new_session=True))
                _wait_until_started(processes[-1], log)
            yield f"127.0.0.1:{port}", access
        finally:
            _kill_all_with(mark)
            for process in processes:
                process.wait()


def _wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.2)


def _kill_all_with(setting: str) -> None:
    """Kills the processes that have this in their environment, and what they start meanwhile."""
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError):
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                if entry.name.isdigit() and not dead and setting.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def test_an_ill_node_of_a_cluster_is_found_out(tmp_path: Path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (tmp_path / "spec.yaml").write_text(SPEC.replace("/no/such/model", str(state / "model")))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    make_gpt2(state / "model", layers=1)
    with two_nodes(hidden(state)) as (address, access):
        found = examined("spec.yaml", "--address", address, cwd=tmp_path, LORA_SWEEPS_HOME=str(state), **access)
    (head,) = set(found) - {"", "driver", "127.0.0.2"}  # Ray puts the machine's own address for 127.0.0.1
    well, ill = found[head], found["127.0.0.2"]
    assert "model's tokenizer" not in found["driver"]
    for name in ("versions", "GPUs", "clock", "checkpoints", "task.model", "task.data.train"):
        assert well[name]["status"] == "ok", well[name]
    assert ill["GPUs"]["status"] == "failed"
    assert "Ray has 2, torch sees" in ill["GPUs"]["found"]
    assert ill["checkpoints"]["status"] == "failed"
    assert "is not there" in ill["checkpoints"]["found"]
    assert ill["task.model"]["status"] == "failed"
    assert ill["task.data.train"]["status"] == ill["versions"]["status"] == ill["clock"]["status"] == "ok"
    assert "give or take" in ill["clock"]["found"]
    assert found[""]["Ray"]["found"].startswith("2 nodes")
    assert found[""]["workers"]["found"].startswith("room for 2")
    assert found[""]["Ray's token"]["status"] == "ok"
    assert not left_in(state)
