"""SkyPilot's task has keys that SkyPilot documents, and its script makes one Ray of the nodes beside SkyPilot's own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli import cli
from tests.deploy.manifests import DEPLOY, Fakes, check_options, literal_secrets
from tests.support import ROOT

TASK: dict[str, Any] = yaml.safe_load((DEPLOY / "skypilot" / "sweep.yaml").read_text())

# Of docs.skypilot.co/en/latest/reference/yaml-spec.html; SkyPilot itself wants an older click than lora-sweeps.
KEYS = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "volumes",
    "file_mounts",
    "setup",
    "run",
    "config",
}
RESOURCES = {"infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size"}
RESOURCES |= {
    "disk_tier",
    "network_tier",
    "image_id",
    "ports",
    "labels",
    "autostop",
    "any_of",
    "ordered",
    "job_recovery",
}

SYSTEM_PORTS = {"6380", "8266", "52365"}
"""SkyPilot's own Ray has these."""


def test_its_keys_are_documented_ones():
    assert set(TASK) <= KEYS
    assert set(TASK["resources"]) <= RESOURCES
    assert TASK["resources"]["use_spot"] is True
    assert TASK["num_nodes"] > 1


def test_skypilot_takes_it_where_it_is_installed():
    schemas = pytest.importorskip("sky.utils.schemas", reason="SkyPilot wants click < 8.2, lora-sweeps 8.2 or later")
    import jsonschema

    jsonschema.validate(TASK, schemas.get_task_schema())


def test_no_secret_is_written_down_and_all_are_asked_for():
    assert TASK["secrets"] == {"RAY_AUTH_TOKEN": None, "LORA_SWEEPS_DATABASE": None}
    assert literal_secrets({name: value for name, value in TASK["envs"].items() if value is not None}) == []
    assert (ROOT / TASK["envs"]["SPEC"]).exists()
    assert TASK["envs"]["STATE"] is None, "a file system that everybody has of their own"


class Node:
    """One of two nodes, where programs only take notes."""

    def __init__(self, folder: Path, rank: int, known: str = "[]") -> None:
        self.folder, self.rank = folder, rank
        self.fakes = Fakes(folder / "lora-sweeps" / "bin")
        self.fakes.add("ray", 'if [[ "$*" == *--head* ]]; then exec sleep 30; fi; [[ "$1" == health-check ]] || exit 1')
        self.fakes.add("python", "echo 2")
        self.fakes.add("lora-sweeps", f"[[ $1 == list ]] && echo '{known}'; true")

    def run(self) -> subprocess.CompletedProcess[str]:
        told = {
            "HOME": str(self.folder),
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NODE_RANK": str(self.rank),
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SPEC": "spec.yaml",
            "SWEEP": "sky",
        }
        return self.fakes.run("bash", "-c", TASK["run"], cwd=self.folder, **told)

    def calls(self, program: str) -> list[list[str]]:
        return [words[1:] for words in self.fakes.calls() if words[0] == program]


def test_the_head_starts_ray_waits_for_all_nodes_runs_the_sweep_and_stops_its_ray(tmp_path: Path):
    from ray.scripts.scripts import start

    head = Node(tmp_path, 0)
    done = head.run()  # returns: the Ray that sleeps was ended
    assert done.returncode == 0, done.stderr
    (started,) = head.calls("ray")
    assert started[0] == "start"
    check_options(start, started[1:])
    assert {"--head", "--block", "--port=6379", "--node-ip-address=10.0.0.1", "--num-gpus=1"} <= set(started)
    assert head.calls("python")[0][-1] == "10.0.0.1:6379"
    listed, run = head.calls("lora-sweeps")
    assert listed == ["list", "--json"]
    assert run == ["run", "spec.yaml", "--name", "sky", "--address", "10.0.0.1:6379"]
    check_options(cli.commands["run"], run[1:])
    told = head.fakes.environments("lora-sweeps")[-1]
    assert (told["RAY_AUTH_MODE"], told["LORA_SWEEPS_HOME"]) == ("token", "/mnt/lora-sweeps/state")


def test_a_head_that_comes_back_goes_on_with_the_sweep(tmp_path: Path):
    head = Node(tmp_path, 0, known='[{"sweep": "sky-1", "name": "sky"}]')
    assert head.run().returncode == 0
    assert head.calls("lora-sweeps")[-1] == ["run", "--resume", "sky", "--address", "10.0.0.1:6379"]


def test_a_worker_joins_and_ends_well_when_the_head_does(tmp_path: Path):
    from ray.scripts.scripts import start

    worker = Node(tmp_path, 1)
    done = worker.run()
    assert done.returncode == 0, done.stderr
    asked, joined = worker.calls("ray")
    assert asked == ["health-check", "--address", "10.0.0.1:6379"]
    check_options(start, joined[1:])
    assert {"--address=10.0.0.1:6379", "--block"} <= set(joined)
    assert worker.calls("lora-sweeps") == []


def test_it_leaves_skypilots_own_ray_alone():
    lines = [line for line in TASK["run"].splitlines() if not line.strip().startswith("#")]
    assert not any("ray stop" in line for line in lines)
    assert not any(f"={port}" in line for line in lines for port in SYSTEM_PORTS)
    assert "--dashboard-agent-listen-port=52366" in TASK["run"]


def test_a_shell_reads_its_setup():
    done = subprocess.run(["bash", "-n", "-c", TASK["setup"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[cluster,hf,postgresql]" in TASK["setup"]
