"""What the connected Ray cluster can grow to, where it has an autoscaler: which nodes that may add, and how many.

Ray has a place where an autoscaler can publish this, but its own do not yet. They are configured by a file on the head
(Ray's cluster launcher), or by the RayCluster in Kubernetes, which the head's pod may read (KubeRay). Where neither
can be read, nothing is known, and the cluster is what it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_NODES = 4096
"""In place of no limit at all."""

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True)
class NodeType:
    """A kind of node that can be added.

    Attributes:
        name: its name in the autoscaler's configuration.
        cpus: of one such node.
        gpus: likewise.
        most: so many of them there can be.
    """

    name: str
    cpus: float
    gpus: float
    most: int


@dataclass(frozen=True, slots=True)
class Growth:
    """What an autoscaler may do.

    Attributes:
        types: the nodes that it can add.
        most: nodes of all types together, the head not counted.
    """

    types: tuple[NodeType, ...]
    most: int


def of_configuration(configuration: Mapping[str, Any]) -> Growth:
    """Reads the configuration of an autoscaler, as Ray's cluster launcher has it."""
    overall = int(configuration.get("max_workers", _MOST_NODES))
    head = configuration.get("head_node_type")
    types = []
    for name, kind in configuration.get("available_node_types", {}).items():
        found = kind.get("resources", {})
        most = min(overall, int(kind.get("max_workers", overall)))
        if name != head and most > 0:
            types.append(NodeType(name, float(found.get("CPU", 0)), float(found.get("GPU", 0)), most))
    return Growth(tuple(types), overall)


def published() -> Growth | None:
    """What an autoscaler has published of itself; None where none has."""
    import ray

    config = ray._private.state.state.get_cluster_config()
    if config is None:
        return None
    types = [
        NodeType(
            group.name,
            float(group.resources.get("CPU", 0)),
            float(group.resources.get("GPU", 0)),
            _MOST_NODES if group.max_count < 0 else group.max_count,
        )
        for group in config.node_group_configs
        if group.max_count
    ]
    return Growth(tuple(types), sum(kind.most for kind in types)) if types else None


def configuration_here(port: str) -> dict[str, Any] | None:
    """Runs on the head: the configuration of its cluster's autoscaler; None where there is none to be found.

    Args:
        port: of the cluster, which may not be the only one on this machine.
    """
    return _of_launcher(port) or _of_kuberay()


def _of_launcher(port: str) -> dict[str, Any] | None:
    """Reads the file that the cluster's autoscaler was started with."""
    import psutil
    from ruamel.yaml import YAML

    for process in psutil.process_iter(["cmdline"]):
        words = dict(
            word.split("=", 1) for word in process.info["cmdline"] or () if word.startswith("--") and "=" in word
        )
        path = words.get("--autoscaling-config")
        if path and words.get("--gcs-address", "").endswith(f":{port}"):
            found = YAML(typ="safe").load(Path(path).expanduser())
            return found if isinstance(found, dict) else None
    return None


def _of_kuberay() -> dict[str, Any] | None:
    """Reads the RayCluster that this pod belongs to, as the autoscaler in the head's pod does."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not _NAMESPACE_FILE.exists():
        return None
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    cluster = KubernetesHttpApiClient(namespace=_NAMESPACE_FILE.read_text().strip()).get(f"rayclusters/{name}")
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return None
    return dict(_derive_autoscaling_config_from_ray_cr(cluster))
