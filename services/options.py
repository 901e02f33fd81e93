"""What several commands share: SWEEP, --server, --json, and whom they ask."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from services import credentials

if TYPE_CHECKING:
    from services.backend import Backend

SWEEP = click.argument("sweep")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
SERVER = click.option(
    "--server",
    metavar="URL",
    envvar=credentials.SERVER,
    callback=lambda _context, _option, value: value or None,  # an empty one is none, whatever the environment says
    help=f"Ask this service (or {credentials.SERVER}); without one, or with '', what ran here.",
)


@contextmanager
def backend_of(server: str | None) -> Iterator[Backend]:
    """A service, or the state directory here."""
    if server is None:
        from services.backend import Local
        from sweeps.home import Home

        with Local(Home.locate()) as local:
            yield local
        return
    from services.client import Client, PlainHttpWarning

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PlainHttpWarning)
        client = Client(server)
    for one in said:
        click.echo(f"warning: {one.message}", err=True)
    with client:
        yield client


def at_server(server: str | None) -> str:
    """What a command must be given to ask the same server; empty where it does so by itself."""
    return "" if server is None or os.environ.get(credentials.SERVER) == server else f" --server {server}"
