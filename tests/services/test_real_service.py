"""The real service: a sweep from its submission to its adapter, a rush of submissions, and what it weighs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import safetensors.numpy

from tests.services.service_support import TINY_SPEC, YAML, Served
from tests.support import environment


def test_the_results_of_a_finished_sweep_are_there(served: Served, finished_sweep: str):
    status = served.status(finished_sweep)
    assert status["trials"]["finished"] == 4
    assert status["progress"]["trials_ended"] == 4
    assert status["mlflow"]["delivered"] is True
    with served.client() as client:
        best = client.get(f"/v1/sweeps/{finished_sweep}/best").json()
        assert best["sweep"] == finished_sweep
        assert best == status["best_point"]
        report = client.get(f"/v1/sweeps/{finished_sweep}/report", params={"format": "md"})
        assert report.status_code == 200, report.text
        assert report.text.startswith(f"# Collapse report: {finished_sweep}")
        export = client.get(f"/v1/sweeps/{finished_sweep}/export", params={"format": "peft"}).json()
        assert json.loads(export["files"]["adapter_config.json"])["r"] == best["rank"]


def test_an_adapter_is_a_folder_of_safetensors(served: Served, finished_sweep: str):
    with served.client() as client:
        best = client.get(f"/v1/sweeps/{finished_sweep}/best").json()
        adapter = client.get(f"/v1/sweeps/{finished_sweep}/adapter")
        assert adapter.status_code == 200, adapter.text
        none = client.get(f"/v1/sweeps/{finished_sweep}/adapter", params={"trial": 99})
        assert none.status_code == 422, none.text
    with zipfile.ZipFile(io.BytesIO(adapter.content)) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        assert {Path(name).name for name in names} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not any(name.startswith("/") or ".." in name for name in names)
        assert all(name.endswith((".json", ".safetensors", ".md")) for name in names), names
        config = json.loads(archive.read("adapter/adapter_config.json"))
        weights = safetensors.numpy.load(archive.read("adapter/adapter_model.safetensors"))
    assert config["r"] == best["rank"]
    shapes = {name: array.shape for name, array in weights.items()}
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {best["rank"]}
    assert {shape[1] for name, shape in shapes.items() if "lora_B" in name} == {best["rank"]}
    assert any(array.any() for name, array in weights.items() if "lora_B" in name), "B has been trained"
    assert not list((served.home / "scratch").iterdir())


def test_its_events_tell_the_whole_sweep(served: Served, finished_sweep: str):
    with served.client() as client:
        lines = client.get(f"/v1/sweeps/{finished_sweep}/events").text.splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds[:2] == ["sweep_created", "queue_moved"]
    assert kinds[-1] == "end"
    assert kinds.count("trial_told") == 4
    states = re.findall(r'"kind":"queue_moved","state":"(\w+)"', "\n".join(lines))
    assert list(dict.fromkeys(states)) == ["queued", "starting", "running", "finished"]


def test_its_log_has_what_its_driver_wrote(served: Served, finished_sweep: str):
    with served.client() as client:
        part = client.get(f"/v1/sweeps/{finished_sweep}/logs").json()
    assert part["text"] == served.log(finished_sweep)
    assert part["text"]


def test_fifty_submissions_at_once_with_one_key_are_one_sweep(served: Served):
    ann, bob = served.add_token("ann"), served.add_token("bob")
    key = {"Idempotency-Key": "a rush".replace(" ", "-")}
    # It can be asked for, and waits: two cores are all there are, and nobody needs it run.
    spec = TINY_SPEC.replace("name: tiny", "name: rush")

    def submit(number: int) -> httpx.Response:
        with served.client(ann) as client:
            return client.post("/v1/sweeps", content=spec, params={"priority": -1}, headers=YAML | key)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(submit, range(50)))
    assert {answer.status_code for answer in answers} == {200, 201}
    assert [answer.status_code for answer in answers].count(201) == 1
    (sweep,) = {answer.json()["sweep"] for answer in answers}
    with served.client(ann) as client:
        assert [one["sweep"] for one in client.get("/v1/sweeps").json()["sweeps"]] == [sweep]
        other = client.post("/v1/sweeps", content=spec + "\n", params={"priority": -1}, headers=YAML | key)
        assert other.status_code == 422, other.text
        assert sweep in other.json()["detail"]
        assert client.post(f"/v1/sweeps/{sweep}/cancel").status_code == 202
    with served.client(bob) as client:
        another = client.post("/v1/sweeps", content=spec, params={"priority": -1}, headers=YAML | key)
        assert another.status_code == 201, another.text
        assert another.json()["sweep"] != sweep
        assert client.post(f"/v1/sweeps/{another.json()['sweep']}/cancel").status_code == 202
    served.wait_for(sweep, "cancelled")
    served.wait_for(another.json()["sweep"], "cancelled")


def test_whatever_is_asked_the_service_loads_nothing_that_trains(served: Served, finished_sweep: str):
    asked: list[tuple[str, dict[str, Any]]] = [
        (f"/v1/sweeps/{finished_sweep}{tail}", {})
        for tail in ("", "/events", "/logs", "/best", "/report", "/report?format=html", "/adapter")
    ]
    asked += [
        (f"/v1/sweeps/{finished_sweep}/export", {"format": form})
        for form in ("peft", "trl", "axolotl", "llamafactory", "unsloth", "hf_trainer", "loralib")
    ]
    asked += [("/v1/sweeps", {}), ("/v1/schema", {}), ("/v1/audit", {}), ("/metrics", {}), ("/readyz", {})]
    with served.client() as client:
        assert client.post("/v1/plan", content=TINY_SPEC, headers=YAML).status_code == 200
        run = {"rank": 8, "alpha": 16, "lr": 2e-4, "to_alpha": 32}
        assert client.post("/v1/translate", json=run).status_code == 200
        for path, query in asked:
            answer = client.get(path, params=query or None)
            assert answer.status_code == (404 if path == "/" and answer.status_code == 404 else 200), (
                path,
                answer.text,
            )
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    loaded = {Path(line.split()[-1]).as_posix() for line in maps.splitlines() if "site-packages" in line}
    assert any("pydantic_core" in path for path in loaded), "else this looks at the wrong process"
    heavy = ("/torch/", "/ray/", "/mlflow/", "/optuna/", "/matplotlib/", "/transformers/", "/pyarrow/", "/pandas/")
    assert [path for path in loaded if any(name in path for name in heavy)] == []


PROBE = """
import sys, tempfile, pathlib
import services.serving, services.planning, services.runner, services.ray_jobs, services.mlflow_server
from tests.services.api_support import open_site, posted, trained
with open_site(pathlib.Path(tempfile.mkdtemp())) as site:
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    client = site.client()
    assert posted(client).status_code == 201
    for tail in ("", "/events", "/logs", "/best", "/export?format=peft", "/adapter"):
        assert client.get("/v1/sweeps/one" + tail).status_code == 200
    site.service.supervisor.tick()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_no_module_of_the_service_imports_what_trains(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"fastapi", "sweeps", "sqlalchemy"} <= loaded
    heavy = {"torch", "ray", "mlflow", "optuna", "matplotlib", "transformers", "datasets", "pandas", "scipy", "sklearn"}
    assert loaded & heavy == set()
