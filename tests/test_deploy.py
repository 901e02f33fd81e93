"""What lies in deploy/ names what there is: settings that the service knows, programs and options that exist."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from services.cli import cli
from services.settings import NOT_SETTINGS, Settings, read_settings
from tests.support import ROOT

SYSTEMD = ROOT / "deploy" / "systemd"


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(SYSTEMD / "lora-sweeps.service")
    return parser


def test_the_environment_file_holds_settings_that_the_service_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = (SYSTEMD / "service.env.example").read_text().splitlines()
    found = dict(line.lstrip("#").split("=", 1) for line in lines if re.match(r"#?(LORA_SWEEPS_)?[A-Z_]+=", line))
    assert len(found) > 15
    # Roots must be there; these are the example's own.
    found |= {f"LORA_SWEEPS_{name}": str(tmp_path) for name in ("MODELS", "DATA")}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    settings = read_settings({}, found)
    assert settings.with_mlflow is True
    assert settings.weights == {"alice": 2.0, "bob": 1.0}
    own = {name.removeprefix("LORA_SWEEPS_") for name in found if name.startswith("LORA_SWEEPS_")}
    assert own <= {name.upper() for name in Settings.model_fields} | NOT_SETTINGS


def test_the_unit_starts_a_command_that_there_is_and_leaves_drivers_alone():
    service = unit()["Service"]
    program, *arguments = service["ExecStart"].split()
    assert Path(program).name == "lora-sweeps"
    assert arguments[0] in cli.commands
    assert service["KillMode"] == "process"
    assert service["EnvironmentFile"] == "/etc/lora-sweeps/service.env"


def test_what_running_drivers_need_outlives_the_service():
    service = unit()["Service"]
    # systemd deletes a private /tmp at every restart, and with it the sockets of Rays that run.
    assert service["PrivateTmp"] == "no"
    # ProtectSystem=strict leaves nothing else writable.
    assert service["ProtectSystem"] == "strict"
    assert set(service["ReadWritePaths"].split()) == {"/tmp", "/var/tmp"}
    assert service["OOMPolicy"] == "continue"


def test_systemd_understands_the_unit(tmp_path: Path):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    text = (SYSTEMD / "lora-sweeps.service").read_text()
    # It looks for the program, the user and the documentation, which are not on this machine.
    text = re.sub(r"(?m)^(ExecStart)=\S+", r"\1=/bin/true", text)
    text = re.sub(r"(?m)^(User|Group|Documentation)=.*\n", "", text)
    (tmp_path / "lora-sweeps.service").write_text(text)
    done = subprocess.run([program, "verify", tmp_path / "lora-sweeps.service"], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "lora-sweeps.service" in line]
    assert not said
