"""Fixtures that several folders of tests use."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support import SMALL_SPEC, run_cli

# Whoever starts the tests in the background of a shell has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, whatever is left on the machine; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("explore", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


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
