"""What the tests of deploy/kuberay share: what its kustomizations build, and what is in that."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, Pod, pods, ray_clusters, tool

KUBERAY = DEPLOY / "kuberay"
OVERLAYS = ("overlays/small", "overlays/gpu", "overlays/production")
ALL = ("base", *OVERLAYS, "rayjob")

TOKEN_KEY, HEAD_SERVICE = "auth_token", "{}-head-svc"
"""What KubeRay makes for a cluster: the key of its token, in a secret of the cluster's name, and the head's service."""

every = pytest.mark.parametrize("name", ALL)
whole = pytest.mark.parametrize("name", OVERLAYS)

Documents = tuple[dict[str, Any], ...]


@cache
def built(name: str) -> tuple[str, str]:
    done = subprocess.run([tool("kubectl"), "kustomize", KUBERAY / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def build(name: str) -> Documents:
    return tuple(yaml.safe_load_all(built(name)[0]))


def all_pods(documents: Documents) -> list[Pod]:
    return [pod for document in documents for pod in pods(document)]


def of_kind(documents: Documents, kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in documents if one["kind"] == kind}


def autoscalers(documents: Documents) -> Iterator[dict[str, Any]]:
    for document in documents:
        for _, cluster in ray_clusters(document):
            if "autoscalerOptions" in cluster:
                yield cluster["autoscalerOptions"]


def environment_of(documents: Documents, container: dict[str, Any]) -> dict[str, str]:
    """What a container's variables are, as far as they stand in the manifests."""
    maps = of_kind(documents, "ConfigMap")
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]["data"]
    return found | {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}


@cache
def made_secrets() -> dict[str, set[str]]:
    """The secrets that make-secrets.sh makes, with their keys."""
    text = (KUBERAY / "make-secrets.sh").read_text()
    names = re.findall(r"(?m)^make ([a-z0-9]+)$", text)
    return {name: set(re.findall(rf"\$keys/{name}/([a-z-]+)", text)) for name in names}
