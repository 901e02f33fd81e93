"""Sweeps over several nodes of a real Ray cluster, as separate processes that die as machines do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_support import ray_cluster
from tests.support import run_cli
from tests.sweeps.spread_sweep import sweep_on, undisturbed, write_spec

# A node that does not answer is given up after three checks of half a second, and not after five of three.
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[int, tuple[Any, ...]]:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def test_a_sweep_outlives_each_of_its_nodes_and_goes_on_where_others_join(
    expected: dict[int, tuple[Any, ...]], tmp_path: Path
):
    with ray_cluster("127.61.0.1", **QUICK) as cluster:
        first, second = cluster.join("127.61.0.2", "127.61.0.3")
        with sweep_on(tmp_path, "spread.yaml", "--address", cluster.address, **cluster.access) as sweep:
            sweep.hold()
            sweep.wait_until_held_on(first, second)
            assert not sweep.lost()

            first.kill()
            (third,) = cluster.join("127.61.0.4")
            sweep.wait_until_held_on(third)
            assert len(sweep.lost()) == 1

            second.kill()
            third.kill()
            sweep.until(lambda: "waiting for a worker: " in sweep.said)
            fourth, fifth = cluster.join("127.61.0.5", "127.61.0.6")
            sweep.wait_until_held_on(fourth, fifth)
            sweep.let_go()
            assert sweep.wait() == 0, sweep.said
        assert len(sweep.lost()) == 3
        assert sweep.done().keys() == {fourth.address, fifth.address}
        sweep.check_whole(expected)
        assert "Traceback" not in sweep.said


def test_when_the_head_dies_the_driver_ends_and_a_new_head_finishes_the_sweep(
    expected: dict[int, tuple[Any, ...]], tmp_path: Path
):
    impatient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # 60, unless it is told
    with (
        ray_cluster("127.62.0.1", cpus=2) as cluster,
        sweep_on(tmp_path, "spread.yaml", "--address", cluster.address, **cluster.access, **impatient) as sweep,
    ):
        sweep.hold()
        sweep.wait_until_held_on(cluster.head)
        cluster.head.kill()
        assert sweep.wait() != 0
        sweep.let_go()
    with (
        ray_cluster("127.62.0.1", cpus=2) as cluster,
        sweep_on(tmp_path, "--resume", "last", "--address", cluster.address, **cluster.access) as sweep,
    ):
        assert sweep.wait() == 0, sweep.said
    sweep.check_whole(expected)


def test_nodes_that_do_not_see_the_state_directory_are_named_and_nothing_is_begun(tmp_path: Path):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("`unshare --mount` is not permitted")
    write_spec(tmp_path)
    elsewhere = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{tmp_path}" && exec "$@"', "sh"]
    with ray_cluster("127.63.0.1") as cluster:
        cluster.join("127.63.0.2", "127.63.0.3", inside={"127.63.0.2": elsewhere, "127.63.0.3": elsewhere})
        done = run_cli("run", "spread.yaml", "--address", cluster.address, cwd=tmp_path, **cluster.access)
    assert done.returncode == 2, done.stderr
    assert "checkpoints must lie where every node reads and writes" in done.stderr
    assert "127.63.0.2: " in done.stderr
    assert "127.63.0.3: " in done.stderr
    assert "set LORA_SWEEPS_HOME to a directory that all nodes share, or LORA_SWEEPS_CHECKPOINTS" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_cli("list", cwd=tmp_path).stdout == ""
