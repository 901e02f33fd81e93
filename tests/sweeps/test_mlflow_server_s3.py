"""MLflow as a cluster has it: a server on a PostgreSQL, which keeps artifacts in an S3."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweeps.events import JobEnded
from sweeps.ledger import Ledger
from sweeps.tracking import MlflowWriter
from tests.postgres_support import postgresql
from tests.s3_support import BUCKET, S3, s3_server
from tests.support import SMALL_SPEC, command, environment, free_port, record_of, run_cli, wait_for_events
from tests.sweeps.mlflow_support import runs_of, seen, server_of


@dataclass
class Place:
    """Where MLflow is.

    Attributes:
        s3: where its artifacts lie.
        database: address of its own database.
        port: of MLflow's server.
        cwd: of the sweep that was tracked there.
    """

    s3: S3
    database: str
    port: int
    cwd: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def s3_settings(self) -> dict[str, str]:
        return {"MLFLOW_S3_ENDPOINT_URL": self.s3.url, **self.s3.environment}

    def serving(self) -> AbstractContextManager[str]:
        store = self.database.replace("postgresql:", "postgresql+psycopg:")
        hosts = ("--allowed-hosts", f"127.0.0.1:{self.port}")
        return server_of(store, self.port, f"s3://{BUCKET}/proxied", *hosts, cwd=self.cwd, **self.s3_settings)

    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.address)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A sweep was tracked there, during which the server was killed and started again; it serves."""
    cwd = tmp_path_factory.mktemp("tracked")
    (cwd / "small.yaml").write_text(SMALL_SPEC)
    with postgresql(cwd) as database, s3_server() as s3:
        there = Place(s3, database, free_port(), cwd)
        with there.serving() as server:
            process = subprocess.Popen(
                command("run", "small.yaml"),
                cwd=cwd,
                env=environment(MLFLOW_TRACKING_URI=server, OMP_NUM_THREADS="1"),  # and no keys
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            wait_for_events(cwd, lambda records: ended(records) > 0, process=process)
        jobs = ended(records_of(cwd))
        with contextlib.suppress(AssertionError):  # it may come to its end, which is as well
            wait_for_events(cwd, lambda records: ended(records) > jobs + 2, process=process)
        with there.serving():
            said, errors = process.communicate()
            assert process.returncode == 0, said + errors
            if record_of(cwd).delivered < record_of(cwd).tellable_seq:  # the server took longer to come back
                done = run_cli("run", "--resume", "last", cwd=cwd)
                assert done.returncode == 0, done.stderr
            yield there


def records_of(cwd: Path) -> list[Any]:
    with Ledger.in_directory(cwd / ".lora-sweeps") as ledger:
        return ledger.read(ledger.find("last").id)


def ended(records: list[Any]) -> int:
    return sum(isinstance(record.event, JobEnded) for record in records)


def parent_of(client: Any, experiment: str, sweep: str) -> Any:
    (parent,) = [run for run in runs_of(client, experiment, sweep) if run.data.tags["lora_sweeps.role"] == "sweep"]
    return parent


def files_below(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def downloaded(client: Any, run: str, to: Path) -> dict[str, bytes]:
    to.mkdir()
    return files_below(Path(client.download_artifacts(run, "", str(to))))


def test_a_server_on_postgresql_has_the_sweep_as_a_file_has_it_and_no_restart_shows(place: Place, tmp_path: Path):
    from mlflow.tracking import MlflowClient

    record = record_of(place.cwd)
    assert record.state == "finished"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with Ledger.in_directory(place.cwd / ".lora-sweeps") as ledger:
        writer = MlflowWriter(ledger, record.id, uri, "small")
        assert writer.finish(300), writer.last_error
    there = seen(place.client(), "small", record.id)
    assert there == seen(MlflowClient(tracking_uri=uri), "small", record.id)
    assert len([run for run in there.values() if run.role == "trial"]) == len(record.trained)
    assert there["sweep "].tags["lora_sweeps.artifacts"] == "delivered"


def test_files_go_through_the_server_to_the_bucket_and_come_back_the_same(place: Place, tmp_path: Path):
    record = record_of(place.cwd)
    assert record.report_directory is not None
    report = files_below(Path(record.report_directory))
    assert {"report.md", "report.html", "adapter/adapter_model.safetensors"} <= report.keys()
    assert b"<svg" in report["report.html"]  # the plots
    parent = parent_of(place.client(), "small", record.id)
    there = downloaded(place.client(), parent.info.run_id, tmp_path / "all")
    assert {name.removeprefix("report/"): data for name, data in there.items() if name.startswith("report/")} == report
    assert there["spec.yaml"].decode() == SMALL_SPEC
    assert {"plan.json", "spec.resolved.json"} <= there.keys()

    prefix = f"proxied/{parent.info.experiment_id}/{parent.info.run_id}/artifacts/"
    items = place.s3.bucket().objects.filter(Prefix=prefix)
    assert {item.key.removeprefix(prefix): item.get()["Body"].read() for item in items} == there


def test_a_host_that_the_server_was_not_told_of_is_refused_with_the_way_out(place: Place, tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    other = {"MLFLOW_TRACKING_URI": f"http://localhost:{place.port}"}
    done = run_cli("run", "small.yaml", cwd=tmp_path, **other)
    assert done.returncode == 2
    assert "--allowed-hosts" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_go_straight_to_a_bucket_where_the_experiment_says_so(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in place.s3_settings.items():
        monkeypatch.setenv(name, value)
    client, record = place.client(), record_of(place.cwd)
    client.create_experiment("direct", artifact_location=f"s3://{BUCKET}/direct")
    with Ledger.in_directory(place.cwd / ".lora-sweeps") as ledger:
        writer = MlflowWriter(ledger, record.id, place.address, "direct")
        assert writer.finish(300), writer.last_error
    parent = parent_of(client, "direct", record.id)
    there = downloaded(client, parent.info.run_id, tmp_path / "all")
    assert record.report_directory is not None
    names = files_below(Path(record.report_directory))
    assert {f"report/{name}": data for name, data in names.items()}.items() <= there.items()
    prefix = f"direct/{parent.info.run_id}/artifacts/"
    kept = {item.key.removeprefix(prefix) for item in place.s3.bucket().objects.filter(Prefix=prefix)}
    assert kept == there.keys()


def test_files_wait_for_a_bucket_that_is_away(place: Place, monkeypatch: pytest.MonkeyPatch):
    for name, value in place.s3_settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    client, record = place.client(), record_of(place.cwd)
    client.create_experiment("late", artifact_location=f"s3://{BUCKET}/late")
    with Ledger.in_directory(place.cwd / ".lora-sweeps") as ledger:
        writer = MlflowWriter(ledger, record.id, place.address, "late")
        writer.start()
        deadline_s = time.monotonic() + 300
        while "endpoint" not in (writer.last_error or ""):
            assert time.monotonic() < deadline_s, writer.last_error
            time.sleep(0.1)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", place.s3.url)  # MLflow's client looks there at every attempt
        assert writer.finish(300), writer.last_error
    items = place.s3.bucket().objects.filter(Prefix="late/")
    assert any(item.key.endswith("report/adapter/adapter_model.safetensors") for item in items)


def test_without_what_writes_to_the_bucket_a_run_does_not_begin(place: Place, tmp_path: Path):
    place.client().create_experiment("far", artifact_location=f"s3://{BUCKET}/far")
    (tmp_path / "small.yaml").write_text(SMALL_SPEC + "tracking: {experiment: far}\n")
    without = "import sys; sys.modules['boto3'] = None; from services.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "run", "small.yaml"],
        cwd=tmp_path,
        env=environment(MLFLOW_TRACKING_URI=place.address),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert f"they go to s3://{BUCKET}/far, which needs the Python package boto3" in done.stderr
    assert "Traceback" not in done.stderr
    with Ledger.in_directory(tmp_path / ".lora-sweeps") as ledger:
        assert ledger.sweeps() == []
