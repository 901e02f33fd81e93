"""A whole sweep, as a user runs it: real Ray, real MLflow, real training; then interrupted, killed, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import import_peft_adapter
from sweeps.events import DriverStarted, JobEnded, JobStarted
from sweeps.ledger import Record
from sweeps.reduction import Reduction
from sweeps.tasks import load_task
from tests.cluster_support import ray_cluster
from tests.conftest import FinishedSweep
from tests.support import (
    SMALL_SPEC,
    pids_with,
    record_of,
    run_cli,
    run_json,
    start_cli,
    trajectory_of,
    wait_for_events,
)


def mlflow_runs(cwd: Path) -> list[Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "small"]
    return client.search_runs([experiment.experiment_id], max_results=1000)


def by_role_and_status(cwd: Path) -> Counter[tuple[str, str]]:
    return Counter((run.data.tags["lora_sweeps.role"], run.info.status) for run in mlflow_runs(cwd))


def test_every_trial_is_accounted_for(finished: FinishedSweep):
    record = record_of(finished.cwd)
    assert finished.output["sweep"] == record.id
    assert finished.output["state"] == "finished"
    assert sum(finished.output["trials"].values()) == len(record.trained) == 24
    assert finished.output["trials"]["finished"] >= 1
    assert finished.output["trials"]["pruned"] >= 1
    assert set(record.jobs_started) == set(record.jobs_ended)
    for trial in record.trained:
        assert [rung.step for rung in trial.rungs] == [10, 20, 40][: len(trial.rungs)]
        assert trial.step == (40 if trial.state == "finished" else trial.step)


def test_the_best_is_the_best_of_the_finished_trials(finished: FinishedSweep):
    values = {trial.number: trial.value for trial in record_of(finished.cwd).trained if trial.state == "finished"}
    best = finished.output["best"]
    assert best["value"] == min(values.values())
    assert values[best["trial"]] == best["value"]
    assert best["metrics"]["eval/loss"] == best["value"]
    printed = run_json("best", "last", "--json", cwd=finished.cwd)
    assert printed == best
    promised = "trial value metric rank alpha lr init_scale weight_decay eps class sweep mlflow_run_id"
    assert set(promised.split()) <= set(printed)


def test_mlflow_has_one_parent_and_a_true_child_for_every_trial(finished: FinishedSweep):
    runs = mlflow_runs(finished.cwd)
    trials = finished.output["trials"]
    expected = {
        ("sweep", "FINISHED"): 1,
        ("trial", "FINISHED"): trials["finished"],
        ("trial", "KILLED"): trials["pruned"],
        ("trial", "FAILED"): trials["diverged"] + trials["failed"],
        ("twin", "FINISHED"): sum(len(c["twins"]) for c in finished.output["certificates"]),
    }
    assert by_role_and_status(finished.cwd) == {key: count for key, count in expected.items() if count}
    parent = finished.output["mlflow"]["parent_run_id"]
    children = [run for run in runs if run.info.run_id != parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    best = next(run for run in runs if run.info.run_id == finished.output["best"]["mlflow_run_id"])
    assert best.data.metrics["eval/loss"] == pytest.approx(finished.output["best"]["value"], rel=1e-12)
    assert best.info.run_name.startswith(f"r{finished.output['best']['rank']} lr")


def test_mlflow_keeps_report_export_and_adapter_with_the_parent(finished: FinishedSweep, tmp_path: Path):
    mlflow = finished.output["mlflow"]
    client = MlflowClient(tracking_uri=mlflow["tracking_uri"])
    folder = Path(client.download_artifacts(mlflow["parent_run_id"], "report", str(tmp_path)))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"report.html", "report.md", "report.json", "export/peft/adapter_config.json"} <= files
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files
    assert "| trial | rank |" in client.get_run(mlflow["parent_run_id"]).data.tags["mlflow.note.content"]


def test_certified_classes_collapse_and_powers_of_four_do_so_to_the_last_bit(finished: FinishedSweep):
    certificates = finished.output["certificates"]
    assert len(certificates) == 2
    twins = [twin for certificate in certificates for twin in certificate["twins"]]
    verdicts = {(twin["configuration"]["alpha"], twin["verdict"]) for twin in twins}
    assert verdicts == {
        (4.0, "bit-identical"),
        (64.0, "bit-identical"),
        (8.0, "identical up to rounding"),
        (32.0, "identical up to rounding"),
    }
    report = run_json("report", "last", "--format", "json", cwd=finished.cwd)
    for certificate in report["certificates"]:
        for twin in certificate["twins"]:
            same = twin["losses"] == certificate["losses"] and twin["update_norms"] == certificate["update_norms"]
            assert same == (twin["verdict"] == "bit-identical")
            assert len(twin["losses"]) == 20


def test_the_trained_adapter_gives_the_reported_loss(finished: FinishedSweep):
    record = record_of(finished.cwd)
    spec = record.spec
    folder = Path(finished.output["report"]).parent / "adapter"
    adapter = import_peft_adapter(folder)
    assert adapter.rank == finished.output["best"]["rank"]
    cache = finished.cwd / ".lora-sweeps" / "cache"
    task = load_task(spec, cache=cache, device=torch.device("cpu"))
    best = record.best
    assert best is not None
    member = Member(Reduction.of(spec).point(best.configuration), seed=0)
    with LoraBank.attach(task.model, spec.lora.target_modules, [member]) as bank:
        bank.load_adapter(0, adapter.tensors)
        (metrics,) = task.evaluate(1)
    assert metrics["eval/loss"] == pytest.approx(finished.output["best"]["value"], rel=1e-6)


def test_state_is_private_to_its_owner(finished: FinishedSweep):
    home = finished.cwd / ".lora-sweeps"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "ray-token").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "ledger.db").stat().st_mode) == 0o600
    token = (home / "ray-token").read_text()
    assert len(token) == 64
    assert token not in finished.stderr


def test_stdout_is_one_json_object_and_progress_goes_to_stderr(finished: FinishedSweep):
    # That stdout was one JSON object is what the fixture has parsed.
    assert "starting Ray" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_resuming_a_finished_sweep_changes_nothing(finished: FinishedSweep):
    before, runs = trajectory_of(record_of(finished.cwd)), len(mlflow_runs(finished.cwd))
    again = run_json("run", "--resume", "last", "--json", cwd=finished.cwd)
    assert again["best"] == finished.output["best"]
    assert trajectory_of(record_of(finished.cwd)) == before
    assert len(mlflow_runs(finished.cwd)) == runs


def check_interrupted(cwd: Path, returncode: int, stderr: str, *, code: int) -> None:
    assert returncode == code, stderr
    record = record_of(cwd)
    assert record.state == "interrupted"
    assert f"lora-sweeps run --resume {record.id}" in stderr
    assert "Traceback" not in stderr
    assert set(by_role_and_status(cwd)) <= {("sweep", "KILLED"), ("trial", "KILLED")}


def jobs_ended(count: int, *, driver: int = 1):
    """Enough once so many jobs have ended under the sweep's n-th driver: a process starts long before it drives."""

    def enough(records: list[Record]) -> bool:
        starts = [i for i, record in enumerate(records) if isinstance(record.event, DriverStarted)]
        own = records[starts[driver - 1] :] if len(starts) >= driver else []
        return sum(isinstance(record.event, JobEnded) for record in own) >= count

    return enough


def certifying(records: list[Record]) -> bool:
    return any(isinstance(record.event, JobStarted) and record.event.work == "certify" for record in records)


def listening_addresses(pids: set[int]) -> set[str]:
    """Where these processes listen for TCP, from /proc."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_a_cluster_that_is_there_gives_the_same_sweep_and_lets_nobody_in_without_its_token(
    finished: FinishedSweep, tmp_path: Path
):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    with ray_cluster("127.0.0.1", cpus=2) as cluster:
        arguments = ("run", "small.yaml", "--address", cluster.address, "--json")
        env = cluster.access
        done = run_cli(*arguments, cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        stranger = run_cli(*arguments, cwd=tmp_path, **(env | {"RAY_AUTH_TOKEN": "0" * 64}))
    assert trajectory_of(record_of(tmp_path)) == trajectory_of(record_of(finished.cwd))
    assert stranger.returncode == 2
    assert "cannot be used" in stranger.stderr
    assert len(json.loads(run_cli("list", "--json", cwd=tmp_path).stdout)) == 1


def test_signals_and_kill_and_resume_lose_nothing_and_change_nothing(finished: FinishedSweep, tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)

    # Ctrl-C, as a terminal sends it: to the whole process group.
    process = start_cli("run", "small.yaml", cwd=tmp_path)
    wait_for_events(tmp_path, jobs_ended(2), process=process)
    ray = pids_with(f"RAY_AUTH_TOKEN_PATH={tmp_path / '.lora-sweeps'}")
    assert len(ray) > 2
    assert listening_addresses(ray) <= {
        "0100007F",
        "0000000000000000FFFF00000100007F",
        "00000000000000000000000001000000",
    }
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    check_interrupted(tmp_path, process.returncode, stderr, code=130)
    sweep = record_of(tmp_path).id

    # SIGTERM, as a service manager sends it: to the one process.
    process = start_cli("run", "--resume", sweep, cwd=tmp_path)
    wait_for_events(tmp_path, jobs_ended(2, driver=2), process=process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    check_interrupted(tmp_path, process.returncode, stderr, code=143)

    # kill -9 in the middle of the rest.
    process = start_cli("run", "--resume", sweep, cwd=tmp_path)
    wait_for_events(tmp_path, jobs_ended(2, driver=3), process=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    listed = run_json("list", "--json", cwd=tmp_path)
    assert [(one["sweep"], one["state"]) for one in listed] == [(sweep, "interrupted")]

    # The rest, and the same search as if nothing had happened.
    output = run_json("run", "--resume", "last", "--json", cwd=tmp_path)
    assert output["sweep"] == sweep
    assert output["state"] == "finished"
    whole, pieced = record_of(finished.cwd), record_of(tmp_path)
    assert trajectory_of(pieced) == trajectory_of(whole)
    assert output["best"]["trial"] == finished.output["best"]["trial"]
    assert by_role_and_status(tmp_path) == by_role_and_status(finished.cwd)


def test_a_second_run_is_a_second_sweep_with_the_same_best_and_its_own_name(finished: FinishedSweep, tmp_path: Path):
    # In a copy of the first one's directory: other tests count what is in that.
    cwd = tmp_path / "copy"
    shutil.copytree(finished.cwd, cwd)
    first = record_of(cwd)
    output = run_json("run", "small.yaml", "--name", "again", "--json", cwd=cwd)
    assert output["sweep"] != first.id
    assert output["sweep"].startswith("again-")
    assert trajectory_of(record_of(cwd, "again")) == trajectory_of(first)
    assert {one["name"] for one in run_json("list", "--json", cwd=cwd)} == {"small", "again"}


def test_another_optimizer_is_one_line_and_a_grid_trains_each_class_once(tmp_path: Path):
    spec = SMALL_SPEC.replace("optimizer: adamw", "optimizer: sgd")
    spec = spec.replace("rank: {values: [2, 4, 8]}", "rank: 4").replace(
        "{min: 1e-3, max: 1e-1}", "{values: [0.1, 0.05, 0.025]}"
    )
    spec = spec.replace("{min: 0.25, max: 4}", "{values: [0.5, 1, 2]}").replace("[4, 8, 16, 32, 64]", "[4, 16]")
    spec = spec.replace("method: tpe, trials: 24", "method: grid")
    (tmp_path / "grid.yaml").write_text(spec)
    plan = run_json("plan", "grid.yaml", "--json", "--classes", "--no-time", cwd=tmp_path)
    assert plan["configurations"] == 18
    members = [member for found in plan["classes_with_members"] for member in found["members"]]
    assert len(members) == 18
    output = run_json("run", "grid.yaml", "--json", cwd=tmp_path)
    record = record_of(tmp_path)
    assert sum(output["trials"].values()) == plan["classes"] == len({trial.class_id for trial in record.trained})
    assert {trial.class_id for trial in record.trained} == {found["class"] for found in plan["classes_with_members"]}


def test_mlflow_being_away_at_the_end_loses_nothing(tmp_path: Path):
    """A tracking database that turns unwritable in the middle: the sweep ends, and a resume delivers the rest."""
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    process = start_cli("run", "small.yaml", "--json", cwd=tmp_path)
    wait_for_events(tmp_path, jobs_ended(2), process=process)
    database, moved = tmp_path / "mlflow.db", tmp_path / "elsewhere.db"
    while not database.exists():
        time.sleep(0.05)
    os.rename(database, moved)
    database.mkdir()
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["state"] == "finished"
    assert json.loads(stdout)["mlflow"]["delivered"] is False
    assert "delivered by `lora-sweeps run --resume" in stderr
    database.rmdir()
    os.rename(moved, database)
    again = run_json("run", "--resume", "last", "--json", cwd=tmp_path)
    assert again["mlflow"]["delivered"] is True
    trials = again["trials"]
    counted = by_role_and_status(tmp_path)
    assert counted["trial", "FINISHED"] == trials["finished"]
    assert counted["trial", "KILLED"] == trials["pruned"]
    assert counted["sweep", "FINISHED"] == 1
