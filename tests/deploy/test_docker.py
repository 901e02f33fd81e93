"""The image: its Dockerfile is in order and copies what there is; its roles start programs with options they have."""

from __future__ import annotations

import http.server
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from services.auth import make_token
from services.store import AuditEntry, Store
from sweeps.home import Home
from sweeps.ledger import Ledger
from tests.deploy.manifests import DEPLOY, EXACT_IMAGE, Fakes, check_options, pinned, tool
from tests.support import ROOT, environment

DOCKER = DEPLOY / "docker"
BIN = DOCKER / "bin"
TEXT = (DOCKER / "Dockerfile").read_text()
STEPS = [
    (found[1], re.sub(r"\s+", " ", found[2]).strip())
    for found in re.finditer(r"(?m)^([A-Z]+) ((?:.*\\\n)*.*)$", re.sub(r"(?m)^#.*\n", "", TEXT).replace("\\\n", " "))
]


def of(instruction: str) -> list[str]:
    return [words for name, words in STEPS if name == instruction]


def load(name: str) -> ModuleType:
    """A program of the image as a module."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(BIN / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing():
    scripts = [BIN / "role", *DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")]
    assert len(scripts) == 4
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_everything_is_built_from_images_of_exact_versions():
    stages = {words.split(" AS ")[1] for words in of("FROM")}
    bases = {words.split(" AS ")[0] for words in of("FROM")} - stages
    # Which of the two stages follows is what ACCELERATOR says; both are there.
    assert "torch-${ACCELERATOR}" in bases
    assert {"torch-cpu", "torch-cuda"} <= stages
    assert of("ARG") == ["ACCELERATOR=cpu"]
    outside = bases - {"torch-${ACCELERATOR}"}
    assert outside
    assert all(EXACT_IMAGE.fullmatch(image) for image in outside)


def test_python_is_one_that_the_project_supports():
    (version,) = re.findall(r"FROM python:(\d+\.\d+)\.\d+-", TEXT)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    lowest, above = re.findall(r"3\.(\d+)", wanted)
    assert int(lowest) <= int(version.split(".")[1]) < int(above)


def test_whatever_is_copied_is_there_and_goes_to_the_builder():
    sources = [word for words in of("COPY") if "--from" not in words for word in words.split()[:-1] if word[0] != "-"]
    assert len(sources) >= 8
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "what is not named does not go"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert set(sources) == let_through
    assert all((ROOT / source).exists() for source in sources)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] + "/" for package in packages} <= let_through


def test_what_is_installed_is_pinned_and_its_extras_exist():
    install = next(words for words in of("RUN") if ".[" in words)
    extras = re.search(r'"\.\[([a-z,]+)\]"', install)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert "--constraint constraints.txt" in install
    assert pinned("torch")
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines if not line.startswith("#"))
    assert "boto3" in {line.split("==")[0] for line in lines}


def test_the_version_of_torch_that_the_steps_read_is_the_pinned_one():
    found = re.search(r'version="\$\((sed [^)]+)\)"', TEXT)
    assert found is not None
    done = subprocess.run(["bash", "-c", found[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pinned("torch")


def test_it_runs_as_nobody_in_particular_and_says_how_it_is():
    assert of("USER") == ["10001:10001"]
    assert TEXT.index("USER 10001") > TEXT.index("apt-get")
    assert "--uid 10001" in TEXT
    assert of("ENTRYPOINT") == ['["tini", "--", "role"]']
    assert [words.split(" CMD ")[1] for words in of("HEALTHCHECK")] == ['["health"]']
    assert all(os.access(BIN / name, os.X_OK) for name in ("role", "health", "wait-for-token", "make-bucket"))


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    made = Fakes(tmp_path / "fakes")
    for name in ("ray", "mlflow", "lora-sweeps", "make-bucket", "wait-for-token"):
        made.add(name)
    return made


def test_the_head_and_the_worker_start_ray_with_options_that_it_has(fakes: Fakes, tmp_path: Path):
    from ray.scripts.scripts import start

    assert fakes.run(BIN / "role", "head", cwd=tmp_path).returncode == 0
    worker = {"RAY_HEAD": "head:6379", "RAY_NODE_CPUS": "4", "RAY_NODE_GPUS": "1"}
    assert fakes.run(BIN / "role", "worker", "--verbose", cwd=tmp_path, **worker).returncode == 0
    head, other = fakes.calls()
    for words in (head, other):
        assert words[:2] == ["ray", "start"]
        check_options(start, words[2:])
    assert {"--head", "--block", "--port=6379", "--dashboard-port=8265", "--num-cpus=0"} <= set(head)
    assert {"--address=head:6379", "--block", "--num-cpus=4", "--num-gpus=1", "--verbose"} <= set(other)


def test_a_worker_is_told_what_it_lacks(fakes: Fakes, tmp_path: Path):
    done = fakes.run(BIN / "role", "worker", cwd=tmp_path)
    assert done.returncode != 0
    assert "RAY_HEAD: HOST:PORT of the head" in done.stderr
    assert fakes.calls() == []


def test_the_service_waits_for_a_token_and_takes_options(fakes: Fakes, tmp_path: Path):
    from services.cli import cli

    assert fakes.run(BIN / "role", "service", "--port", "9", cwd=tmp_path).returncode == 0
    assert fakes.calls() == [["wait-for-token"], ["lora-sweeps", "serve", "--port", "9"]]
    check_options(cli.commands["serve"], ["--port", "9"])


MLFLOW = {
    "MLFLOW_ARTIFACTS": "s3://mlflow",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow:5000",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "http://localhost:5000",
}


def test_mlflow_is_told_its_names_and_its_secrets_stay_off_the_command_line(fakes: Fakes, tmp_path: Path):
    for name in ("url", "key", "secret"):
        (tmp_path / name).write_text(f"the {name}\n")
    files = {
        "MLFLOW_BACKEND_STORE_URI_FILE": str(tmp_path / "url"),
        "AWS_ACCESS_KEY_ID_FILE": str(tmp_path / "key"),
        "AWS_SECRET_ACCESS_KEY_FILE": str(tmp_path / "secret"),
    }
    done = fakes.run(BIN / "role", "mlflow", cwd=tmp_path, **MLFLOW, **files)
    assert done.returncode == 0, done.stderr
    bucket, server = fakes.calls()
    assert bucket == ["make-bucket", "s3://mlflow"]
    assert server[:2] == ["mlflow", "server"]
    words = [sys.executable, "-m", "mlflow", "server", "--help"]
    known = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True).stdout
    assert {word for word in server if word.startswith("--") and " " not in word} <= set(
        re.findall(r"--[a-z-]+", known)
    )
    assert server[server.index("--allowed-hosts") + 1] == "mlflow:5000"
    assert server[server.index("--cors-allowed-origins") + 1] == "http://localhost:5000"
    (told,) = fakes.environments("mlflow")
    assert (told["MLFLOW_BACKEND_STORE_URI"], told["AWS_SECRET_ACCESS_KEY"]) == ("the url", "the secret")
    assert not any("the " in word for word in server)


@pytest.mark.parametrize("missing", sorted(MLFLOW))
def test_mlflow_does_not_start_without_its_names(fakes: Fakes, tmp_path: Path, missing: str):
    settings = {name: value for name, value in MLFLOW.items() if name != missing}
    done = fakes.run(BIN / "role", "mlflow", cwd=tmp_path, MLFLOW_BACKEND_STORE_URI="sqlite://", **settings)
    assert done.returncode != 0
    assert missing in done.stderr
    assert not any(words[0] == "mlflow" for words in fakes.calls())


def test_another_command_is_run_as_it_is(fakes: Fakes, tmp_path: Path):
    assert fakes.run(BIN / "role", "lora-sweeps", "list", "--json", cwd=tmp_path).returncode == 0
    assert fakes.calls() == [["lora-sweeps", "list", "--json"]]


@pytest.fixture
def answering() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/well" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_health_is_what_the_role_answers(answering: str, monkeypatch: pytest.MonkeyPatch):
    health = load("health")
    roles = {"mlflow": f"{answering}/well", "head": f"{answering}/ill", "worker": "http://127.0.0.1:1/"}
    monkeypatch.setattr(health, "ROLES", roles)
    codes = {}
    for role in ("mlflow", "head", "worker", "lora-sweeps"):
        monkeypatch.setattr(sys, "argv", ["health", role])
        codes[role] = health.main()
    assert codes == {"mlflow": 0, "head": 1, "worker": 1, "lora-sweeps": 0}


def test_health_asks_where_programs_answer_without_a_token():
    from mlflow.server.security_utils import HEALTH_ENDPOINTS
    from ray.dashboard import http_server_agent, http_server_head

    roles = load("health").ROLES
    assert roles["mlflow"].removeprefix("http://127.0.0.1:5000") in HEALTH_ENDPOINTS
    for role, module in (("head", http_server_head), ("worker", http_server_agent)):
        path = "/" + roles[role].split("/", 3)[3]
        assert path in Path(str(module.__file__)).read_text()
    assert roles["service"].endswith(":8321/healthz")


def test_the_service_waits_until_somebody_has_a_token(tmp_path: Path):
    said = environment(LORA_SWEEPS_HOME=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, BIN / "wait-for-token"], env=said, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stderr is not None
        assert "lora-sweeps token create" in waiting.stderr.readline()
        assert waiting.poll() is None
        with Ledger.in_directory(Home(tmp_path).path) as ledger:
            made = AuditEntry("ann", "token create", detail="")
            Store(ledger).add_token(make_token(), user="ann", scope="admin", note="", expires_at_s=None, audit=made)
        assert waiting.wait(timeout=30) == 0


def test_a_bucket_is_made_where_it_is_missing():
    pytest.importorskip("boto3", reason="boto3 is the image's, and not installed here")
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            known = self.command != "HEAD" or len(asked) > 2
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_PUT(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        settings = {
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        words = [sys.executable, BIN / "make-bucket", "s3://runs/below"]
        said = environment(**settings)
        done = [subprocess.run(words, env=said, capture_output=True, text=True) for _ in range(2)]
        server.shutdown()
        thread.join()
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert asked == ["HEAD /runs", "PUT /runs", "HEAD /runs"]
