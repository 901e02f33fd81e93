"""The wheel installs and runs outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_core import __version__
from tests.support import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = folder / "source"
    for name in filter(None, tracked.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"lora_sweeps-{__version__}-")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    probe = (
        "import lora_core, sweeps, services\n"
        f"assert all(m.__file__.startswith({str(installed)!r}) for m in (lora_core, sweeps, services))\n"
        "from services.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-c", probe, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def test_the_wheel_runs_outside_the_repository(installed: Path, tmp_path: Path):
    for arguments in (["--version"], ["init"], ["validate", "sweep.yaml"], ["schema"], ["plan", "sweep.yaml"]):
        done = run(installed, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr


def test_the_wheel_has_its_data_and_nothing_of_the_repository(installed: Path):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"sweeps/template.yaml", "sweeps/report.html.j2", "sweeps/report.md.j2", "lora_core/py.typed"} <= names
    packages = {"lora_core", "sweeps", "services"}
    assert {name.split("/")[0] for name in names} - packages == {f"lora_sweeps-{__version__}.dist-info"}
