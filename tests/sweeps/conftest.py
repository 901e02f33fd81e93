"""Fixtures that several files of this folder use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sweeps import preflight


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The models here are too small to share: with several threads the tests take several times as long."""
    with preflight.one_thread():
        yield
