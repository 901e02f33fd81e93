from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from sweeps.autoscaling import Growth, NodeType, configuration_here, of_configuration
from sweeps.errors import ClusterError
from sweeps.node_memory import Memory, memory_here
from sweeps.nodes import Cluster, Node, Resources, room, share
from tests.support import environment

GB = 10**9

CPU_WORKER, GPU_WORKER = Resources(1.0, 0.0), Resources(1.0, 1.0)


def node(cpus: float, gpus: float = 0.0, *, is_head: bool = False) -> Node:
    return Node("n", "127.0.0.1", cpus, gpus, is_head)


HEAD = node(0, is_head=True)


def growing(*types: NodeType, most: int = 100) -> Cluster:
    return Cluster((HEAD,), Growth(types, most))


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "expected"),
    [
        (4, 0, CPU_WORKER, 4),
        (0, 0, CPU_WORKER, 0),
        (8, 2, GPU_WORKER, 2),
        (1, 2, GPU_WORKER, 1),
        (8, 4, Resources(1.0, 2.0), 2),
        (8, 3, Resources(1.0, 2.0), 1),
        (8, 1, Resources(1.0, 0.5), 2),
        (8, 2, Resources(1.0, 0.4), 4),  # two on each; what is left of both is no third
        (32, 1, Resources(1.0, 0.1), 10),
    ],
)
def test_a_worker_lies_on_one_node_with_all_its_gpus(cpus, gpus, resources, expected):
    assert room(node(cpus, gpus), resources) == expected


def test_without_an_autoscaler_there_are_the_workers_that_there_is_room_for():
    cluster = Cluster((HEAD, node(2), node(3)), None)
    assert cluster.workers(CPU_WORKER) == 5
    assert cluster.workers(CPU_WORKER, 3) == 3
    assert cluster.workers(CPU_WORKER, 9) == 5


def test_with_an_autoscaler_there_are_as_many_workers_as_there_can_be_nodes_for():
    small, large = NodeType("small", 2, 0, 10), NodeType("large", 16, 4, 2)
    assert growing(small, large).workers(CPU_WORKER) == 10 * 2 + 2 * 16
    assert growing(small, large, most=3).workers(CPU_WORKER) == 2 * 16 + 2
    assert growing(small, large).workers(GPU_WORKER) == 2 * 4
    assert growing(small, large).workers(GPU_WORKER, 20) == 20
    # Nodes that somebody started by hand may be more than it would.
    assert Cluster((HEAD, node(50)), Growth((small,), 10)).workers(CPU_WORKER) == 50


def test_a_worker_takes_a_gpu_where_there_are_any_or_can_be():
    assert Cluster((HEAD, node(8)), None).resources("auto") == CPU_WORKER
    assert Cluster((HEAD, node(8), node(8, 1)), None).resources("auto") == GPU_WORKER
    assert growing(NodeType("gpu", 8, 1, 2)).resources("auto") == GPU_WORKER
    assert Cluster((node(8, 1),), None).resources(0.0) == CPU_WORKER


def test_a_worker_that_fits_on_no_node_is_refused_unless_a_node_that_fits_can_be_added():
    with pytest.raises(ClusterError, match="1 CPU and 1 GPUs of one node; the nodes have 0 CPUs and 0 GPUs; 4 CPUs"):
        Cluster((HEAD, node(4)), None).check_fits(GPU_WORKER)
    with pytest.raises(ClusterError, match=r"those that can be added have 8 CPUs and 1 GPUs \(gpu\); lower"):
        growing(NodeType("gpu", 8, 1, 2)).check_fits(Resources(1.0, 2.0))
    growing(NodeType("gpu", 8, 2, 1)).check_fits(Resources(1.0, 2.0))


def test_it_is_said_that_nodes_without_gpus_are_not_used():
    mixed = Cluster((HEAD, node(4), node(8), node(8, 1)), None)
    assert "2 nodes without any are not used, 12 CPUs in all" in mixed.unused(GPU_WORKER)
    assert mixed.unused(CPU_WORKER) == ""
    # A head that takes no part is as it should be.
    assert Cluster((node(4, is_head=True), node(8, 1)), None).unused(GPU_WORKER) == ""


def test_a_worker_has_the_memory_of_its_gpus_or_its_part_of_the_main_memory():
    unequal = Memory(free_bytes=60 * GB, gpu_bytes=(80 * GB, 24 * GB))
    assert share(unequal, 2, GPU_WORKER) == 24 * GB
    assert share(unequal, 4, Resources(1.0, 0.5)) == 12 * GB
    assert share(unequal, 5, CPU_WORKER) == 10 * GB
    assert share(Memory(60 * GB, ()), 1, GPU_WORKER) is None


def test_a_machine_says_what_memory_it_has():
    found = memory_here(gpus=True)
    assert 0 < found.free_bytes <= psutil.virtual_memory().total
    assert len(found.gpu_bytes) == torch.cuda.device_count()


def test_the_configuration_of_ray_s_launcher_says_what_nodes_there_can_be():
    gpu = {"resources": {"CPU": 8, "GPU": 1}, "min_workers": 0, "max_workers": 4}
    # A type without a limit of its own has that of all; the head is none that is added.
    types = {
        "head": {"resources": {"CPU": 4}},
        "gpu": gpu,
        "cpu": {"resources": {"CPU": 2}},
        "never": {"max_workers": 0},
    }
    found = of_configuration({"max_workers": 6, "head_node_type": "head", "available_node_types": types})
    assert found == Growth((NodeType("gpu", 8, 1, 4), NodeType("cpu", 2, 0, 6)), 6)


def test_a_ray_cluster_of_kubernetes_says_what_nodes_there_can_be():
    container = {"resources": {"limits": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}}}
    workers = {"groupName": "workers", "minReplicas": 1, "maxReplicas": 8, "rayStartParams": {}}
    cluster = {
        "metadata": {"name": "ray", "namespace": "lora-sweeps"},
        "spec": {
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"},
                "template": {"spec": {"containers": [{"resources": {}}]}},
            },
            "workerGroupSpecs": [workers | {"template": {"spec": {"containers": [container]}}}],
        },
    }
    found = of_configuration(_derive_autoscaling_config_from_ray_cr(cluster))
    assert found == Growth((NodeType("workers", 8, 1, 8),), 8)


def test_the_autoscaler_s_file_is_found_by_the_port_of_its_cluster(tmp_path: Path):
    config = {"max_workers": 2, "available_node_types": {}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    words = ["-c", "input()", f"--autoscaling-config={tmp_path / 'config.yaml'}", "--gcs-address=127.0.0.1:1"]
    with psutil.Popen([sys.executable, *words], stdin=-1) as monitor:
        assert configuration_here("1") == config
        assert configuration_here("2") is None
        monitor.communicate(b"\n")
    assert configuration_here("1") is None


EXCHANGE = """
import json, sys
from pathlib import Path
from sweeps import nodes, storage
from sweeps.engine import cluster

place = Path(sys.argv[1])
with cluster(None, workers=1, token_file=Path(sys.argv[2])):
    well = [answer.error for answer in nodes.exchange(str(place))]
    after_well = sorted(path.name for path in place.iterdir())
    late = [answer.error for answer in nodes.exchange(str(place), timeout_s=0)]
    after_late = sorted(path.name for path in place.iterdir())
    storage.leave_mark(str(place), "mark")
    (said,) = nodes.ask(nodes._read_and_write, str(place), "mark")
    written = sorted(path.name for path in place.iterdir())
    print(json.dumps([well, after_well, late, after_late, written, said.node.id, said.error]))
"""


def test_what_nodes_write_to_be_read_here_is_removed_whether_they_answer_or_not(tmp_path: Path):
    place = tmp_path / "place"
    place.mkdir()
    words = [sys.executable, "-c", EXCHANGE, str(place), str(tmp_path / "token")]
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    well, after_well, late, after_late, written, node_id, error = json.loads(done.stdout.splitlines()[-1])
    assert (well, after_well) == ([""], [])
    assert (late, after_late) == (["no answer within 0 s"], [])
    assert error == ""
    # The name of what a node writes is known before it answers.
    assert written == ["mark", f"mark-{node_id}"]
