"""A sweep on a cluster that grows: real Ray, its real autoscaler, with nodes that are processes of this machine.

Ray's own `AutoscalingCluster` is not used: it ends every Ray of the machine, whoever's it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sweeps.events import JobStarted
from tests.support import SMALL_SPEC, command, environment, pids_with, record_of, run_cli, wait_for_events

PATIENCE_S = 300
"""Nodes are processes that import much, on a machine that may have other things to do."""

# Says how many nodes live, whenever it is asked.
WATCH = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
for _ in sys.stdin:
    print(sum(node["Alive"] for node in ray.nodes()), flush=True)
"""


@dataclass(frozen=True)
class Growing:
    """A cluster whose head takes no jobs, and to which nodes are added.

    Attributes:
        address: of its head.
        env: what lets one in.
        nodes: how many nodes live, the head among them.
    """

    address: str
    env: dict[str, str]
    nodes: Callable[[], int]

    def wait_for(self, nodes: int) -> None:
        """Waits until so many nodes live."""
        end_s = time.monotonic() + PATIENCE_S
        while (found := self.nodes()) != nodes:
            assert time.monotonic() < end_s, f"{found} nodes live, not {nodes}"
            time.sleep(0.2)


def configuration(port: int) -> dict[str, object]:
    """Of an autoscaler that may add two nodes with a CPU each, and removes them after some seconds without work."""
    worker = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}, "max_workers": 2}
    provider = {
        "type": "fake_multinode",
        "gcs_address": f"127.0.0.1:{port}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    commands = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": worker,
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{name}_commands": [] for name in commands}


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "autoscaler.json").write_text(json.dumps(configuration(port)))
    token = secrets.token_hex(32)
    # Ray puts sockets below its directory, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        env = {"RAY_TMPDIR": scratch, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
        own = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        words = f"start --head --block --port={port} --num-cpus=0 --node-ip-address=127.0.0.1 --include-dashboard=false"
        arguments = [*words.split(), f"--autoscaling-config={tmp_path / 'autoscaler.json'}"]
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            env=environment(**env, **own),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            with watching(head, f"127.0.0.1:{port}", env) as nodes:
                yield Growing(f"127.0.0.1:{port}", env, nodes)
        finally:
            for pid in pids_with(f"RAY_AUTH_TOKEN={token}") | {head.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.communicate()


@contextlib.contextmanager
def watching(head: subprocess.Popen[str], address: str, env: dict[str, str]) -> Iterator[Callable[[], int]]:
    assert head.stdout is not None
    said = []
    for line in head.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            break
    else:
        raise AssertionError("".join(said))
    with subprocess.Popen(
        [sys.executable, "-c", WATCH, address],
        env=environment(**env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None

        def nodes() -> int:
            watcher.stdin.write("\n")
            watcher.stdin.flush()
            return int(watcher.stdout.readline())

        yield nodes


@pytest.mark.skipif(sys.platform != "linux", reason="looks its processes up in /proc")
def test_nodes_come_for_a_sweep_and_go_after_it_even_if_its_driver_is_killed(growing: Growing, tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC.replace("workers: 2", "workers: auto"))
    assert growing.nodes() == 1
    arguments = ("run", "small.yaml", "--address", growing.address, "--json")
    driver = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment(**growing.env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_events(tmp_path, lambda records: any(isinstance(r.event, JobStarted) for r in records), process=driver)
    growing.wait_for(3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    growing.wait_for(1)

    plan = record_of(tmp_path).plan
    assert plan.workers == 2
    assert any("memory of the workers is not known here" in warning for warning in plan.warnings)
    done = run_cli(
        "run", "--resume", "last", "--address", growing.address, "--json", cwd=tmp_path, timeout_s=900, **growing.env
    )
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path)
    assert record.state == "finished"
    assert len(record.trained) == 24
    assert {trial.state for trial in record.trained} <= {"finished", "pruned"}
    growing.wait_for(1)
