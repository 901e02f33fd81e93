"""The parts that deploy/kuberay builds find each other, and nothing else finds them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from services.cli import cli
from services.settings import read_settings
from tests.deploy.kustomized import (
    HEAD_SERVICE,
    TOKEN_KEY,
    Documents,
    all_pods,
    build,
    environment_of,
    every,
    made_secrets,
    of_kind,
    whole,
)
from tests.deploy.manifests import DEPLOY, Pod, check_options, pinned, pods, ray_clusters
from tests.support import ROOT


@whole
def test_every_reference_leads_somewhere(name: str):
    documents = build(name)
    made = of_kind(documents, "PersistentVolumeClaim"), of_kind(documents, "ConfigMap")
    secrets = made_secrets() | {cluster: {TOKEN_KEY} for one in documents for cluster, _ in ray_clusters(one)}
    every_pod = all_pods(documents) + all_pods(build("rayjob"))
    claims, maps = set(made[0]), set(made[1]) | set(of_kind(build("rayjob"), "ConfigMap"))
    for pod in every_pod:
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            elif "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            elif "secret" in volume:
                keys = {item["key"] for item in volume["secret"]["items"]}
                assert keys <= secrets[volume["secret"]["secretName"]]
        for container in pod.containers:
            for one in container.get("env", []):
                if "valueFrom" in one:
                    reference = one["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in secrets[reference["name"]]
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            templates = (
                of_kind(documents, "StatefulSet").get(pod.name, {}).get("spec", {}).get("volumeClaimTemplates", [])
            )
            own = {one["metadata"]["name"] for one in templates}
            assert mounted == {volume["name"] for volume in pod.spec.get("volumes", [])} | own


@whole
def test_every_service_finds_its_pods_and_their_port(name: str):
    documents = build(name)
    services = of_kind(documents, "Service")
    assert {"sweeps", "mlflow", "postgres"} <= set(services)
    for service in services.values():
        found = [pod for pod in all_pods(documents) if pod.matches({"matchLabels": service["spec"]["selector"]})]
        assert len(found) == 1
        assert all(found[0].ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    for workload in (*of_kind(documents, "Deployment").values(), *of_kind(documents, "StatefulSet").values()):
        (pod,) = pods(workload)
        assert pod.matches(workload["spec"]["selector"])
        assert workload["spec"].get("serviceName", pod.name) in services
    for ingress in of_kind(documents, "Ingress").values():
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["port"]["name"] in {one["name"] for one in services[backend["name"]]["spec"]["ports"]}


@whole
def test_every_address_in_a_variable_is_a_service_here(name: str):
    documents = build(name)
    ports = {
        name: {one["port"] for one in made["spec"]["ports"]} for name, made in of_kind(documents, "Service").items()
    }
    ports |= {HEAD_SERVICE.format(cluster): {6379, 8265} for one in documents for cluster, _ in ray_clusters(one)}
    addresses = 0
    for pod in all_pods(documents) + all_pods(build("rayjob")):
        for container in pod.containers:
            for variable, value in environment_of((*documents, *build("rayjob")), container).items():
                url = urlsplit(value)
                if url.scheme == "http" and "," not in value and url.hostname != "localhost":
                    addresses += 1
                    assert url.port in ports[str(url.hostname)], (variable, value)
    assert addresses >= 4


def allowed(documents: Documents, source: Pod, target: Pod, port: int) -> tuple[bool, bool]:
    """Whether the network policies let a connection between two pods out of the one, and into the other."""
    policies = [one["spec"] for one in of_kind(documents, "NetworkPolicy").values()]

    def passes(pod: Pod, other: Pod, direction: str, peers: str) -> bool:
        mine = [one for one in policies if direction in one["policyTypes"] and pod.matches(one["podSelector"])]
        assert mine, "nothing is open by default"
        for rule in (rule for one in mine for rule in one.get(direction.lower(), [])):
            to = [peer["podSelector"] for peer in rule.get(peers, []) if "podSelector" in peer]
            fits = peers not in rule or any(other.matches(selector) for selector in to)
            if fits and ("ports" not in rule or any(one["port"] == port for one in rule["ports"])):
                return True
        return False

    return passes(source, target, "Egress", "to"), passes(target, source, "Ingress", "from")


WAYS = {
    ("sweeps", "ray-head", 8265),
    ("sweeps", "postgres", 5432),
    ("sweeps", "mlflow", 5000),
    ("ray-head", "postgres", 5432),
    ("ray-head", "mlflow", 5000),
    ("mlflow", "postgres", 5432),
    ("ray-submitter", "ray-head", 8265),
    ("mlflow", "rustfs", 9000),
    ("ray-head", "redis", 6379),
}
"""Who talks to whom, beside Ray's nodes among each other."""


@whole
def test_the_network_lets_through_what_is_needed_and_nothing_else(name: str):
    documents = build(name)
    known = {pod.labels["app.kubernetes.io/name"]: pod for pod in all_pods(documents) + all_pods(build("rayjob"))}
    ray = {"ray-head", "ray-worker"}
    for source_name, source in known.items():
        for target_name, target in known.items():
            ports = set(target.ports.values()) | {12345}
            for port in ports:
                expected = {source_name, target_name} <= ray or (source_name, target_name, port) in WAYS
                where = source_name, target_name, port
                assert allowed(documents, source, target, port) == (expected, expected), where


@whole
def test_the_policies_name_labels_and_ports_that_there_are(name: str):
    documents = build(name)
    known = all_pods(documents) + all_pods(build("rayjob"))
    ports = {port for pod in known for port in pod.ports.values()} | {53, 443, 6443}
    labels = {pod.labels["app.kubernetes.io/name"] for pod in known} | {"ray-submitter"}
    for policy in of_kind(documents, "NetworkPolicy").values():
        text = json.dumps(policy["spec"])
        assert {int(found) for found in re.findall(r'"port": (\d+)', text)} <= ports
        assert set(re.findall(r'"app.kubernetes.io/name": "([a-z-]+)"', text)) <= labels
        for values in re.findall(r'"values": \[([^]]*)\]', text):
            assert set(json.loads(f"[{values}]")) <= labels


@whole
def test_the_service_takes_its_settings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = build(name)
    (container,) = next(pod for pod in all_pods(documents) if pod.name == "sweeps").containers
    told = environment_of(documents, container)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for root in ("LORA_SWEEPS_MODELS", "LORA_SWEEPS_DATA"):
        assert told[root] in mounts
        told[root] = str(tmp_path)
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
    settings = read_settings({}, told)
    assert settings.behind_proxy
    assert settings.ray_address == "http://ray-head-svc:8265"
    assert Path(told["LORA_SWEEPS_DATABASE_FILE"]).parent.as_posix() in mounts
    groups = of_kind(documents, "RayCluster")["ray"]["spec"]["workerGroupSpecs"]
    each = "num-gpus" if "num-gpus" in groups[0]["rayStartParams"] else "num-cpus"
    assert settings.devices == sum(int(one["rayStartParams"][each]) * one["maxReplicas"] for one in groups)


@whole
def test_mlflow_answers_under_every_name_that_it_is_called_by(name: str):
    documents = build(name)
    told = of_kind(documents, "ConfigMap")["mlflow"]["data"]
    called = {
        value
        for pod in all_pods(documents) + all_pods(build("rayjob"))
        for container in pod.containers
        for variable, value in environment_of((*documents, *build("rayjob")), container).items()
        if variable in ("MLFLOW_TRACKING_URI", "LORA_SWEEPS_MLFLOW_URL")
    }
    assert len(called) == 2
    hosts = told["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert {urlsplit(url).netloc for url in called} <= set(hosts)
    assert "*" not in hosts
    seen = of_kind(documents, "ConfigMap")["service"]["data"]["LORA_SWEEPS_MLFLOW_URL"]
    assert seen in told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")


@every
def test_ray_is_what_the_image_has_wants_a_token_and_fits_its_pods(name: str):
    for document in build(name):
        for cluster_name, cluster in ray_clusters(document):
            assert cluster["rayVersion"] == pinned("ray")
            assert cluster["authOptions"] == {"mode": "token"}
            assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            for group in cluster["workerGroupSpecs"]:
                assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
                (container,) = group["template"]["spec"]["containers"]
                limits, started = container["resources"]["limits"], group["rayStartParams"]
                assert int(started["num-cpus"]) <= int(limits["cpu"]), cluster_name
                assert started.get("num-gpus") == limits.get("nvidia.com/gpu")


@every
def test_all_nodes_see_the_state_under_one_path(name: str):
    seen = {}
    for pod in all_pods(build(name)):
        claims = {
            one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in pod.spec.get("volumes", [])
        }
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if claims.get(mount["name"]) == "state":
                    seen[pod.labels["app.kubernetes.io/name"]] = mount["mountPath"]
    nodes = {"ray-head", "ray-worker"}
    assert nodes <= set(seen)
    assert set(seen.values()) == {"/var/lib/lora-sweeps"}
    assert (
        "ENV GIT_PYTHON_REFRESH=quiet \\\n    LORA_SWEEPS_HOME=/var/lib/lora-sweeps"
        in (DEPLOY / "docker" / "Dockerfile").read_text()
    )


def test_gpu_workers_go_to_nodes_that_others_keep_off():
    for name in ("overlays/gpu", "overlays/production"):
        (group,) = of_kind(build(name), "RayCluster")["ray"]["spec"]["workerGroupSpecs"]
        spec = group["template"]["spec"]
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
        assert spec["containers"][0]["image"].endswith("-cuda")


def test_production_scales_and_its_head_is_found_again():
    documents = build("overlays/production")
    cluster = of_kind(documents, "RayCluster")["ray"]["spec"]
    assert cluster["enableInTreeAutoscaling"] is True
    redis = urlsplit(cluster["gcsFaultToleranceOptions"]["redisAddress"])
    (port,) = of_kind(documents, "Service")[str(redis.hostname)]["spec"]["ports"]
    assert redis.port == port["port"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "redis"
    (ingress,) = of_kind(documents, "Ingress").values()
    hosts = [host for one in ingress["spec"]["tls"] for host in one["hosts"]]
    assert hosts == [rule["host"] for rule in ingress["spec"]["rules"]]
    assert set(hosts) <= set(of_kind(documents, "ConfigMap")["service"]["data"]["LORA_SWEEPS_ALLOWED_HOSTS"].split(","))
    for budget in of_kind(documents, "PodDisruptionBudget").values():
        assert len([pod for pod in all_pods(documents) if pod.matches(budget["spec"]["selector"])]) == 1


def test_the_job_runs_the_demo_by_a_command_that_there_is():
    documents = build("rayjob")
    job = of_kind(documents, "RayJob")["sweep"]["spec"]
    program, command, *words = shlex.split(job["entrypoint"])
    assert program == "lora-sweeps"
    check_options(cli.commands[command], words)
    head = next(pod for pod in all_pods(documents) if pod.name == "sweep-head")
    folders = {mount["mountPath"] for mount in head.containers[0]["volumeMounts"]}
    assert Path(words[0]).parent.as_posix() in folders
    (spec,) = of_kind(documents, "ConfigMap")["sweep"]["data"].items()
    assert spec == (Path(words[0]).name, (ROOT / "examples" / "digits.yaml").read_text())
