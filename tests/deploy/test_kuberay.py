"""Every kustomization of deploy/kuberay builds, and what it builds is valid, bounded and guarded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from lora_core import __version__
from sweeps.secrecy import has_secret
from tests.deploy.kustomized import (
    KUBERAY,
    all_pods,
    autoscalers,
    build,
    built,
    environment_of,
    every,
    made_secrets,
    of_kind,
)
from tests.deploy.manifests import EXACT_IMAGE, Fakes, literal_secrets, pods, ray_clusters, strings

KUBERNETES = "1.34"
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "kuberay-v1.json").read_text())


@every
def test_it_builds_without_a_warning(name: str):
    text, said = built(name)
    assert text
    assert said == ""


@every
def test_every_document_is_what_kubernetes_and_kuberay_take(name: str):
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in build(name):
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.validate(document, SCHEMA)
        else:
            validate(document, KUBERNETES, strict=True)
        for pod in pods(document):
            as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "labels": pod.labels}}
            validate(as_pod | {"spec": pod.spec}, KUBERNETES, strict=True)
    for options in autoscalers(build(name)):
        keys = {key: options[key] for key in ("resources", "securityContext")}
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        validate(as_pod | {"spec": {"containers": [{"name": "x", **keys}]}}, KUBERNETES, strict=True)


def test_the_schemas_refuse_what_is_misspelt():
    validate = pytest.importorskip("kubernetes_validate").validate
    cluster = json.loads(json.dumps(of_kind(build("base"), "RayCluster")["ray"]))
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate(cluster, SCHEMA)
    cluster = json.loads(json.dumps(of_kind(build("base"), "RayCluster")["ray"]))
    cluster["spec"]["authOption"] = {}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.validate(cluster, SCHEMA)
    policy = json.loads(json.dumps(of_kind(build("base"), "NetworkPolicy")["postgres"]))
    policy["spec"]["podSelectors"] = {}
    with pytest.raises(jsonschema.ValidationError, match="podSelectors"):
        validate(policy, KUBERNETES, strict=True)


@every
def test_every_image_has_an_exact_version(name: str):
    images = {one["image"] for pod in all_pods(build(name)) for one in pod.containers}
    assert images
    assert all(EXACT_IMAGE.fullmatch(image) for image in images), images
    ours = {image for image in images if "lora-sweeps" in image}
    assert ours
    assert all(image.split(":")[-1] in (f"{__version__}-cpu", f"{__version__}-cuda") for image in ours)


@every
def test_every_container_is_bounded(name: str):
    documents = build(name)
    for pod in all_pods(documents):
        for container in pod.containers:
            given = container["resources"]
            for kind in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(given[kind]), (pod.name, kind)
            assert given["requests"].get("nvidia.com/gpu") == given["limits"].get("nvidia.com/gpu")
        for volume in pod.spec.get("volumes", []):
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]
    for options in autoscalers(documents):
        assert all({"cpu", "memory"} <= set(options["resources"][kind]) for kind in ("requests", "limits"))


@every
def test_no_secret_is_written_down(name: str):
    documents = build(name)
    assert not of_kind(documents, "Secret")
    assert not [text for document in documents for text in strings(document) if has_secret(text)]
    for pod in all_pods(documents):
        for container in pod.containers:
            assert literal_secrets(environment_of(documents, container)) == [], pod.name
    for document in documents:
        for _, cluster in ray_clusters(document):
            password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
            assert "value" not in password


@every
def test_every_pod_may_do_as_little_as_it_needs(name: str):
    documents = build(name)
    for pod in all_pods(documents):
        own = pod.spec["securityContext"]
        assert own["runAsNonRoot"] is True
        assert own["runAsUser"] > 0
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}
        # Else Kubernetes sets variables such as MLFLOW_PORT, which MLflow would follow.
        assert pod.spec["enableServiceLinks"] is False
        for container in pod.containers:
            guard = container["securityContext"]
            assert guard["allowPrivilegeEscalation"] is False
            assert guard["capabilities"] == {"drop": ["ALL"]}
    scaled = bool(list(autoscalers(documents)))
    may_ask = {pod.name for pod in all_pods(documents) if pod.spec["automountServiceAccountToken"]}
    assert may_ask == ({"ray-head"} if scaled else set())


@every
def test_every_lasting_container_says_how_it_is(name: str):
    lasting = [pod for pod in all_pods(build(name)) if pod.spec.get("restartPolicy") != "Never"]
    assert lasting
    for pod in lasting:
        for container in pod.spec["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                ways = container[probe]
                if "httpGet" in ways:
                    assert ways["httpGet"]["port"] in pod.ports
                else:
                    assert ways["exec"]["command"][0] in ("health", "pg_isready", "sh")


def test_the_service_is_asked_under_a_name_that_it_answers_to():
    """A probe's Host header is the pod's address, unless it says otherwise; to that the service answers 400."""
    (container,) = next(pod for pod in all_pods(build("base")) if pod.name == "sweeps").containers
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "localhost"}]


def test_secrets_are_made_at_random_once_and_off_the_command_line(tmp_path: Path):
    fakes = Fakes(tmp_path / "fakes")
    kept = tmp_path / "kept"
    kept.mkdir()
    fakes.add(
        "kubectl",
        f'[[ "$*" == *"get secret redis"* ]] && exit 0\n[[ "$*" == *"get secret"* ]] && exit 1\n'
        f'last="${{!#}}"; cp -r "${{last#--from-file=}}" {kept}',
    )
    done = fakes.run(KUBERAY / "make-secrets.sh", "team", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "secret/redis is there already" in done.stdout
    created = [words for words in fakes.calls() if "create" in words]
    assert all(words[:3] == ["kubectl", "--namespace", "team"] for words in fakes.calls())
    assert [words[6] for words in created] == ["database", "s3"]
    files = {path.relative_to(kept).as_posix(): path.read_text() for path in kept.rglob("*") if path.is_file()}
    assert set(files) == {f"{name}/{key}" for name in ("database", "s3") for key in made_secrets()[name]}
    password = files["database/password"]
    assert re.fullmatch(r"[0-9a-f]{48}", password)
    assert files["database/ledger-url"] == f"postgresql://lora_sweeps:{password}@postgres:5432/lora_sweeps"
    assert len(set(files.values())) == len(files)
    assert not any(value in " ".join(words) for words in fakes.calls() for value in files.values())
    assert not Path(created[0][-1].removeprefix("--from-file=")).exists(), "nothing is left behind"
