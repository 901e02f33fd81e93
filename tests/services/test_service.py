"""A sweep through the service, from its submission to its adapter."""

from __future__ import annotations

from tests.services.service_support import Served


def test_a_sweep_goes_from_submission_to_its_export(served: Served):
    sweep = served.submit()
    status = served.wait_for(sweep, "finished", "failed", "paused")
    assert (status["state"], status["reason"]) == ("finished", "")
    assert status["trials"]["finished"] == 4
    assert status["mlflow"]["delivered"] is True
    with served.client() as client:
        best = client.get(f"/v1/sweeps/{sweep}/best").json()
        assert best["sweep"] == sweep
        report = client.get(f"/v1/sweeps/{sweep}/report", params={"format": "md"})
        assert report.status_code == 200, report.text
        export = client.get(f"/v1/sweeps/{sweep}/export", params={"format": "peft"}).json()
        assert "adapter_config.json" in export["files"]
        adapter = client.get(f"/v1/sweeps/{sweep}/adapter")
        assert adapter.status_code == 200, adapter.text
        assert adapter.content[:2] == b"PK"
