"""deploy/compose: valid, whole, bounded, without a secret, and its parts find each other."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from lora_core import __version__
from services.settings import read_settings
from tests.deploy.manifests import DEPLOY, EXACT_IMAGE, Fakes, literal_secrets, strings
from tests.support import ROOT

COMPOSE = DEPLOY / "compose"
TEXT = (COMPOSE / "compose.yaml").read_text()
EXAMPLE = dict(
    line.split("=", 1) for line in (COMPOSE / ".env.example").read_text().splitlines() if re.match(r"[A-Z_]+=", line)
)
ROLES = {"mlflow": ["mlflow"], "head": ["head"], "worker": ["worker"], "worker-gpu": ["worker"], "service": ["service"]}
LISTENING = {"postgres": {5432}, "rustfs": {9000}, "mlflow": {5000}, "head": {6379, 8265}, "service": {8321}}


def compose(**changes: str) -> dict[str, Any]:
    """The file as compose reads it with the example's settings."""
    settings = EXAMPLE | changes
    read: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda found: settings[found[1]], TEXT))
    return read


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def told(name: str) -> dict[str, str]:
    return {key: str(value) for key, value in SERVICES[name].get("environment", {}).items()}


def test_it_is_what_compose_takes():
    vendored = pytest.importorskip("check_jsonschema").__file__
    schema = Path(vendored).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    validator.validate(compose())
    with pytest.raises(jsonschema.ValidationError, match="immage"):
        validator.validate({"services": {"x": {"immage": "y"}}})


def test_every_variable_is_in_the_example_and_none_is_there_for_nothing():
    used = set(re.findall(r"\$\{(\w+)\}", TEXT))
    assert "$" not in re.sub(r"\$\{\w+\}", "", TEXT), "every variable is written as ${NAME}"
    assert used == set(EXAMPLE)
    assert all(EXAMPLE.values())


def test_no_setting_of_the_example_would_reach_the_service_as_one_of_its_own():
    assert not [name for name in EXAMPLE if name.startswith("LORA_SWEEPS_")]


def test_every_image_has_an_exact_version():
    for name, service in SERVICES.items():
        assert EXACT_IMAGE.fullmatch(service["image"]), name
        if name in ROLES:
            accelerator = service["build"]["args"]["ACCELERATOR"]
            assert service["image"] == f"lora-sweeps:{__version__}-{accelerator}"
            assert (COMPOSE / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).exists()


def test_every_container_is_bounded_guarded_and_says_how_it_is():
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0, name
        assert re.fullmatch(r"\d+[gm]", limits["memory"]), name
        assert service["pids_limit"] > 0
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["logging"]["options"]["max-size"]


def test_the_workers_memory_holds_rays_object_store():
    for name in ("head", "worker", "worker-gpu"):
        store, shm = int(told(name)["RAY_OBJECT_STORE_BYTES"]), SERVICES[name]["shm_size"]
        assert store < int(shm.removesuffix("m")) * 2**20


def test_the_images_roles_are_the_commands():
    assert {name: SERVICES[name]["command"] for name in ROLES} == ROLES
    role = (DEPLOY / "docker" / "bin" / "role").read_text()
    assert all(f"\n{words[0]})\n" in role for words in ROLES.values())


def test_profiles_differ_in_their_workers_only():
    assert {name: one["profiles"] for name, one in SERVICES.items() if "profiles" in one} == {
        "worker": ["cpu"],
        "worker-gpu": ["gpu"],
    }
    (gpus,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": EXAMPLE["WORKER_GPUS"], "capabilities": ["gpu"]} or gpus["count"] == 1
    assert int(EXAMPLE["DEVICES"]) == int(EXAMPLE["WORKERS"]) * int(EXAMPLE["WORKER_CPUS"])


def test_nothing_is_published_beyond_this_machine():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_no_secret_is_written_down():
    for name in SERVICES:
        assert literal_secrets(told(name)) == [], name
    assert literal_secrets(EXAMPLE) == []
    read = compose()
    assert all(source["file"].startswith("./secrets/") for source in read["secrets"].values())
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/deploy/compose/secrets/", "/deploy/compose/.env"} <= set(ignored)


def test_every_secret_is_one_that_is_made_and_is_given_to_whoever_reads_it():
    made = set(re.findall(r"(?m)^write ([a-z0-9-]+) ", (COMPOSE / "make-secrets.sh").read_text()))
    assert set(compose()["secrets"]) == made
    for name, service in SERVICES.items():
        read = {found for text in strings(told(name)) for found in re.findall(r"/run/secrets/([a-z0-9-]+)", text)}
        assert read == set(service.get("secrets", [])), name


def test_secrets_are_made_at_random_and_once(tmp_path: Path):
    script = tmp_path / "make-secrets.sh"
    script.write_bytes((COMPOSE / "make-secrets.sh").read_bytes())
    fakes = Fakes(tmp_path / "fakes")
    first = fakes.run("bash", script, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "secrets"
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert len(set(made.values())) == 6
    assert made["ledger-url"] == f"postgresql://lora_sweeps:{made['postgres-password']}@postgres:5432/lora_sweeps"
    assert made["mlflow-url"].endswith(f":{made['postgres-password']}@postgres:5432/mlflow")
    assert all(value not in first.stdout for value in made.values())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}, "containers read as other users"
    (folder / "ray-token").unlink()
    assert fakes.run("bash", script, cwd=tmp_path).stdout.splitlines() == ["made secrets/ray-token"]
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"ray-token"}


def test_every_address_is_a_part_that_listens_on_a_common_network():
    addresses = 0
    for name, service in SERVICES.items():
        for value in told(name).values():
            for host, port in re.findall(r"(?:^|//)([a-z]+):(\d+)$", value):
                if host == "localhost":
                    continue
                addresses += 1
                assert int(port) in LISTENING[host]
                assert set(service["networks"]) & set(SERVICES[host]["networks"]), (name, host)
    assert addresses >= 6
    urls = re.findall(r"@([a-z]+):(\d+)/(\w+)", (COMPOSE / "make-secrets.sh").read_text())
    assert {(host, int(port)) for host, port, _ in urls} == {("postgres", 5432)}
    # One of the two databases is made with the server, the other by its first start.
    assert {database for *_, database in urls} == {told("postgres")["POSTGRES_DB"], "mlflow"}
    assert compose()["configs"]["databases"]["content"] == "CREATE DATABASE mlflow;"
    for name in ("mlflow", "head", "service"):
        assert set(SERVICES[name]["networks"]) & set(SERVICES["postgres"]["networks"])


def test_whoever_waits_waits_for_a_part_that_says_how_it_is():
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other]


def test_all_nodes_and_the_service_see_the_same_places_under_the_same_paths():
    (volumes,) = {json.dumps(SERVICES[name]["volumes"]) for name in ("head", "worker", "worker-gpu", "service")}
    targets = [one.split(":")[1] if isinstance(one, str) else one["target"] for one in json.loads(volumes)]
    assert targets == ["/var/lib/lora-sweeps", "/srv/models", "/srv/data"]
    assert told("service")["LORA_SWEEPS_DATABASE_FILE"] == told("head")["LORA_SWEEPS_DATABASE_FILE"]


def test_the_service_takes_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = told("service") | {f"LORA_SWEEPS_{name}": str(tmp_path) for name in ("MODELS", "DATA")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings({}, given)
    assert settings.behind_proxy
    assert settings.devices == int(EXAMPLE["DEVICES"])
    assert settings.ray_address == "http://head:8265"
    assert "service" in settings.hosts


def test_mlflow_answers_under_every_name_that_it_is_called_by():
    hosts = told("mlflow")["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    called = {told("head")["MLFLOW_TRACKING_URI"], told("service")["MLFLOW_TRACKING_URI"], EXAMPLE["MLFLOW_URL"]}
    assert {urlsplit(url).netloc for url in called} <= set(hosts)
    assert EXAMPLE["MLFLOW_URL"] in told("mlflow")["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert urlsplit(EXAMPLE["MLFLOW_URL"]).port == int(EXAMPLE["MLFLOW_PORT"])


def test_docker_compose_reads_it_where_it_is_installed(tmp_path: Path):
    try:
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("docker is not installed")
    if asked.returncode:
        pytest.skip("docker has no compose")
    words = ["docker", "compose", "--env-file", COMPOSE / ".env.example", "--file", COMPOSE / "compose.yaml", "config"]
    done = subprocess.run([*map(str, words), "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
