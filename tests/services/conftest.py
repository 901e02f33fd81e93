"""Fixtures that several files of this folder use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.service_support import Served, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that several files share: who changes it for others starts one of their own."""
    with serving(tmp_path_factory.mktemp("served") / "home", "--devices", "2") as one:
        yield one


@pytest.fixture(scope="session")
def finished_sweep(served: Served) -> str:
    """A sweep that the service has run to its end."""
    sweep = served.submit()
    status = served.wait_for(sweep, "finished", "failed", "paused")
    assert (status["state"], status["reason"]) == ("finished", ""), served.log(sweep)
    return sweep
