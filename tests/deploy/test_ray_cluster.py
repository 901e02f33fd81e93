"""Ray's launcher takes deploy/ray-cluster, its nodes' commands are in order, and its workers are spot nodes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.settings import NOT_SETTINGS
from tests.deploy.manifests import DEPLOY, Fakes, check_options, literal_secrets, tool

FOLDER = DEPLOY / "ray-cluster"
CLOUDS = ("aws", "gcp")

every = pytest.mark.parametrize("cloud", CLOUDS)


def config(cloud: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    return read


@every
def test_rays_launcher_takes_it(cloud: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config(cloud))))


@every
def test_rays_launcher_refuses_what_is_misspelt(cloud: str):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(config(cloud) | {"setup_comands": []}))


@every
def test_workers_are_spot_nodes_with_a_gpu_and_there_are_so_many_at_most(cloud: str):
    read = config(cloud)
    kinds = read["available_node_types"]
    head, spot = kinds[read["head_node_type"]], kinds["spot-gpu"]
    assert head["resources"] == {"CPU": 0}
    assert spot["resources"]["GPU"] == 1
    assert 1 <= spot["min_workers"] <= spot["max_workers"] <= read["max_workers"]
    bought = {
        "aws": spot["node_config"].get("InstanceMarketOptions", {}).get("MarketType"),
        "gcp": spot["node_config"].get("scheduling", {}).get("provisioningModel"),
    }
    assert str(bought[cloud]).lower() == "spot"
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"]


def commands(cloud: str) -> list[str]:
    read = config(cloud)
    return [line for name in read if name.endswith("_commands") for line in read[name]]


@every
def test_every_command_is_one_that_a_shell_reads(cloud: str, tmp_path: Path):
    script = tmp_path / "commands.sh"
    script.write_text("#!/bin/bash\n" + "\n".join(commands(cloud)) + "\n")
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    # The profile is each user's own; `echo` is there for its pattern.
    words = [tool("shellcheck"), "--exclude=SC1090,SC1091,SC2116,SC2016,SC2088", str(script)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@every
def test_ray_is_started_with_options_that_it_has_and_the_profiles_environment(cloud: str, tmp_path: Path):
    from ray.scripts.scripts import start

    read, fakes = config(cloud), Fakes(tmp_path / "venv")
    fakes.add("ray")
    profile = tmp_path / ".config" / "lora-sweeps" / "profile"
    profile.parent.mkdir(parents=True)
    profile.write_text((FOLDER / "profile.example").read_text())
    for command in (*read["head_start_ray_commands"], *read["worker_start_ray_commands"]):
        done = fakes.run("bash", "-c", command, cwd=tmp_path, HOME=str(tmp_path), RAY_HEAD_IP="10.0.0.1")
        assert done.returncode == 0, done.stderr
    stop, head, again, worker = (words[1:] for words in fakes.calls())
    assert stop == again == ["stop"]
    assert head[0] == worker[0] == "start"
    for words in (head, worker):
        check_options(start, words[1:])
    assert {"--head", "--port=6379", "--dashboard-host=127.0.0.1"} <= set(head)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head, "as the launcher looks for it; Ray expands it"
    assert "--address=10.0.0.1:6379" in worker
    for told in fakes.environments("ray"):
        assert told["RAY_AUTH_MODE"] == "token"
        assert told["LORA_SWEEPS_HOME"].startswith("/mnt/lora-sweeps/")
        own = {name.removeprefix("LORA_SWEEPS_") for name in told if name.startswith("LORA_SWEEPS_")}
        assert own <= NOT_SETTINGS
        assert literal_secrets(told) == []


@every
def test_the_state_directory_is_on_the_file_system_that_every_node_mounts(cloud: str):
    mounts = [line for line in config(cloud)["initialization_commands"] if "mount -t nfs" in line]
    assert len(mounts) == 1
    assert mounts[0].endswith(" /mnt/lora-sweeps")
    assert "export LORA_SWEEPS_HOME=/mnt/lora-sweeps/state\n" in (FOLDER / "profile.example").read_text()


@every
def test_what_is_taken_along_is_what_the_commands_use(cloud: str):
    read = config(cloud)
    home = f"/home/{read['auth']['ssh_user']}/"
    taken = {target.removeprefix(home) for target in read["file_mounts"]}
    assert all(target.startswith(home) for target in read["file_mounts"])
    used = {found for line in commands(cloud) for found in re.findall(r"~/((?:\.config/)?lora-sweeps)\b", line)}
    assert used == taken
    assert literal_secrets({"all": json.dumps(read)}) == []
