"""What the cluster's documents name is there: files, commands, overlays, variables."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from services.cli import cli
from tests.deploy.manifests import DEPLOY, check_options
from tests.support import ROOT

CLUSTER = ROOT / "docs" / "cluster.md"
README = DEPLOY / "README.md"
TEXT = CLUSTER.read_text()
LINES = [
    line[2:]
    for block in re.findall(r"```console\n(.*?)```", TEXT.replace("\\\n", " "), flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.parametrize("page", [CLUSTER, README], ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    named = set(re.findall(r"\b((?:deploy|examples|tests)/[A-Za-z0-9_./-]*[A-Za-z0-9_])", text))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_anchors_lead_to_headings():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"(?m)^## (.+)$", TEXT)}
    anchors = {re.sub(r"\s+", "-", anchor) for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT)}
    assert len(anchors) == 5
    assert anchors <= headings


def test_every_directory_of_deploy_has_its_row():
    folders = {path.name for path in DEPLOY.iterdir() if path.is_dir()}
    rows = set(re.findall(r"(?m)^\| \[([a-z-]+)\]\(", README.read_text()))
    assert rows == folders


def test_commands_of_ours_have_the_options_that_are_shown():
    shown = [shlex.split(line) for line in LINES] + [
        shlex.split(line) for line in re.findall(r"`(lora-sweeps [^`]+)`", TEXT)
    ]
    ours = [words[words.index("lora-sweeps") + 1 :] for words in shown if "lora-sweeps" in words]
    checked = [words for words in ours if words[0] in cli.commands]
    assert len(checked) >= 5
    for words in checked:
        check_options(cli.commands[words[0]], words[1:])


def test_variables_that_are_set_are_read_by_the_files():
    for line in LINES:
        for name in re.findall(r"\b([A-Z][A-Z_]+)=", line):
            where = "skypilot" if "sky" in line or "RAY_AUTH_TOKEN" in line else "slurm"
            if "ACCELERATOR" in line:
                where = "docker"
            assert any(name in path.read_text() for path in (DEPLOY / where).iterdir() if path.is_file()), name


def test_settings_of_compose_that_are_named_are_there():
    section = TEXT.split("## Compose")[1].split("## Kubernetes")[0]
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", section))
    example = (DEPLOY / "compose" / ".env.example").read_text()
    assert named
    assert all(re.search(rf"(?m)^{name}=", example) for name in named)


def test_the_namespace_and_the_overlays_are_those_of_the_manifests():
    base = yaml.safe_load((DEPLOY / "kuberay" / "base" / "kustomization.yaml").read_text())
    assert {found for line in LINES for found in re.findall(r"--namespace (lora-\S+)", line)} == {base["namespace"]}
    overlays = {path.name for path in (DEPLOY / "kuberay" / "overlays").iterdir()}
    assert overlays == set(re.findall(r"(?m)^\| `([a-z]+)` \|", TEXT))
    operator = re.search(r"--namespace (kuberay-\w+)", " ".join(LINES))
    assert operator is not None
    assert operator[1] in (DEPLOY / "kuberay" / "base" / "network-policies.yaml").read_text()
