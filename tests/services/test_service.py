"""Everything at once, as a small team has it: one command serves, another submits, and all of the results are there."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from tests.services.service_support import TINY_SPEC, serving
from tests.support import free_port, run_cli


def test_a_sweep_goes_from_its_submission_to_the_page_the_report_the_export_and_mlflow(tmp_path: Path):
    port = free_port()
    (tmp_path / "tiny.yaml").write_text(TINY_SPEC)
    home = tmp_path / "home"
    with serving(home, "--devices", "2", "--with-mlflow", "--mlflow-port", str(port)) as served:
        there = {"LORA_SWEEPS_SERVER": served.url, "LORA_SWEEPS_HOME": str(home)}
        submitted = run_cli("submit", "tiny.yaml", "--json", cwd=tmp_path, **there)
        assert submitted.returncode == 0, submitted.stderr
        sweep = json.loads(submitted.stdout)["sweep"]
        watched = run_cli("watch", sweep, cwd=tmp_path, **there)
        assert watched.returncode == 0, watched.stderr
        assert f"{sweep}: finished" in watched.stdout

        with served.client() as client:
            page = client.get(f"/sweeps/{sweep}", headers={"Accept": "text/html"})
            assert page.status_code == 200
            assert "4 of 4" in page.text
            report = client.get(f"/v1/sweeps/{sweep}/report", params={"format": "html"})
            assert report.headers["content-security-policy"].startswith("sandbox")
            assert sweep in report.text
        exported = run_cli(
            "export", sweep, "--format", "peft", "--output", "out", "--adapter", "adapter", cwd=tmp_path, **there
        )
        assert exported.returncode == 0, exported.stderr
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0

        # The sweep is in the MLflow that was started beside the service, whole.
        mlflow = served.status(sweep)["mlflow"]
        assert mlflow["tracking_uri"] == f"http://127.0.0.1:{port}"
        assert mlflow["delivered"] is True
        found = searched(mlflow["tracking_uri"], mlflow["experiment_id"])
        roles = sorted(tag["value"] for run in found for tag in run["data"]["tags"] if tag["key"] == "lora_sweeps.role")
        assert roles == ["sweep", *["trial"] * 4, *["twin"] * roles.count("twin")]
        assert {run["info"]["status"] for run in found} == {"FINISHED"}


def searched(uri: str, experiment: str) -> list[dict[str, dict[str, list[dict[str, str]]]]]:
    """The runs of an experiment, as MLflow's server tells."""
    body = json.dumps({"experiment_ids": [experiment], "max_results": 100}).encode()
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs: list[dict[str, dict[str, list[dict[str, str]]]]] = json.load(answer)["runs"]
    return runs


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_service_does_not_listen_beyond_this_machine_without_tokens(tmp_path: Path, host: str):
    done = run_cli("serve", "--host", host, "--port", "0", cwd=tmp_path, LORA_SWEEPS_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert "only once there are tokens" in done.stderr
    assert "Traceback" not in done.stderr
