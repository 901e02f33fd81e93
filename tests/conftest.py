"""Fixtures that several folders of tests use."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from services.cli import main
from tests.support import SMALL_SPEC, Done, Here, run_cli

# Whoever starts the tests in the background of a shell has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; read by torch when it is first imported, here and in what tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, whatever is left on the machine; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("explore", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


_LONGEST = (
    "test_sweep.py",
    "test_several_nodes.py",
    "test_namespaces.py",
    "test_restart.py",
    "test_ledger_away.py",
    "test_remote_run.py",
    "test_documentation.py",
)
"""Files of whole sweeps: begun first, so that no process is left alone with one in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, whatever else is run."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs a command in this process: `here("validate", "spec.yaml", LORA_SWEEPS_HOME="…")`."""

    def run(*arguments: str, **env: str) -> Done:
        code: object = 0
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["lora-sweeps", *arguments])
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        captured = capsys.readouterr()
        return Done(int(str(code or 0)), captured.out, captured.err)

    return run


@dataclass(frozen=True)
class FinishedSweep:
    """A small sweep that was run to its end by the real program."""

    cwd: Path
    output: dict[str, Any]
    stderr: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedSweep:
    cwd = tmp_path_factory.mktemp("finished")
    (cwd / "small.yaml").write_text(SMALL_SPEC)
    done = run_cli("run", "small.yaml", "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return FinishedSweep(cwd, json.loads(done.stdout), done.stderr)
