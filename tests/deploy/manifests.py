"""What the tests of deploy/ share: tools, documents, the pods in them, and programs that only take notes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweeps.secrecy import has_secret
from tests.support import ROOT

DEPLOY = ROOT / "deploy"

EXACT_IMAGE = re.compile(r"(?:[a-z0-9.-]+(?::\d+)?/)?[a-z0-9._/-]+:v?\d+(?:\.\d+)+(?:-[a-z0-9.]+)*")
"""Has a tag that names one version, and is not `latest`."""

_NAMES_A_SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL|URI$|DATABASE$")
_IS_A_PLACE = re.compile(r"_(FILE|PATH)$")


def tool(name: str) -> str:
    """A program of this environment, or else of this machine; the test is skipped where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"(?m)^{package}==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert found is not None, package
    return found[1]


@dataclass(frozen=True)
class Pod:
    """A pod template and where it stands."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for one in self.containers for port in one.get("ports", [])}

    def matches(self, selector: dict[str, Any]) -> bool:
        """Whether a label selector selects it."""
        wanted = selector.get("matchLabels", {}).items()
        among = selector.get("matchExpressions", [])
        assert all(one["operator"] == "In" for one in among)
        return all(self.labels.get(key) == value for key, value in wanted) and all(
            self.labels.get(one["key"]) in one["values"] for one in among
        )


def ray_clusters(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The Ray cluster that a document describes, with its name."""
    if document["kind"] == "RayCluster":
        yield document["metadata"]["name"], document["spec"]
    if document["kind"] == "RayJob":
        yield document["metadata"]["name"], document["spec"]["rayClusterSpec"]


def pods(document: dict[str, Any]) -> Iterator[Pod]:
    """The pods that a document has made."""
    name = document["metadata"]["name"]
    templates = []
    if document["kind"] in ("Deployment", "StatefulSet"):
        templates.append((name, document["spec"]["template"]))
    for _, cluster in ray_clusters(document):
        templates.append((f"{name}-head", cluster["headGroupSpec"]["template"]))
        templates += [(f"{name}-{group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
    if document["kind"] == "RayJob":
        templates.append((f"{name}-submitter", document["spec"]["submitterPodTemplate"]))
    for where, template in templates:
        yield Pod(where, template["metadata"]["labels"], template["spec"])


def strings(node: Any) -> Iterator[str]:
    """Every text of a document."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


def literal_secrets(environment: dict[str, str]) -> list[str]:
    """Names of variables that hold a secret as it is: not the place of one, nor an address without one."""
    return [
        name
        for name, value in environment.items()
        if has_secret(value)
        or (_NAMES_A_SECRET.search(name) and not _IS_A_PLACE.search(name) and not value.startswith("http"))
    ]


class Fakes:
    """Programs on a PATH of their own that write down what they were called with, and answer as told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder / "bin", folder / "calls.jsonl"
        self.folder.mkdir(parents=True)

    def add(self, name: str, answer: str = "") -> None:
        """Adds a program; `answer` is more of its shell script."""
        note = "json.dumps([sys.argv[1:], dict(os.environ)])"
        recorder = f"import json, os, sys; print({note}, file=open({str(self._log)!r}, 'a'))"
        path = self.folder / name
        path.write_text(f'#!/bin/bash\n"{sys.executable}" -S -c "{recorder}" {name} "$@"\n{answer}\n')
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """What was called, in order: names with their arguments."""
        return [json.loads(line)[0] for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def environments(self, name: str) -> list[dict[str, str]]:
        """The environments of a program's calls."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [environment for words, environment in lines if words[0] == name]

    def run(self, *words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a script that finds these programs first."""
        path = f"{self.folder}{os.pathsep}/usr/bin{os.pathsep}/bin"
        return subprocess.run(
            [*map(str, words)], cwd=cwd, env={"PATH": path} | environment, capture_output=True, text=True, timeout=60
        )


def check_options(command: Any, words: list[str]) -> None:
    """Parses the words of a click command as it would: an option that it does not have is an error."""
    import click

    context = click.Context(command, info_name=command.name)
    command.make_parser(context).parse_args(list(words))
