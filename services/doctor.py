"""`lora-sweeps doctor`: whether a sweep would run here, or on a cluster, before money is spent on it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from services.options import AS_JSON

if TYPE_CHECKING:
    from sweeps.checkup import Check


@click.command()
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@click.option("--address", help="A running Ray cluster: HOST:PORT or auto. Without it this machine alone.")
@AS_JSON
def doctor(spec: Path | None, address: str | None, as_json: bool) -> None:
    """Check a machine, or a cluster, before a sweep is run on it.

    With a SPEC also what that needs: its model and data, memory, GPUs, its tracking server. Exits 2 if a check failed.
    """
    try:
        checks = _examined(spec, address)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        _leave(130)
    failed = any(check.status == "failed" for check in checks)
    if as_json:
        _print_json(checks)
    else:
        print_checks(checks)
    _leave(2 if failed else 0)


def _examined(spec: Path | None, address: str | None) -> list[Check]:
    from sweeps.errors import ClusterError
    from sweeps.examination import examine
    from sweeps.home import Home
    from sweeps.secrecy import hide_passwords
    from sweeps.spec import load_spec

    if address is not None and address.startswith(("http://", "https://", "ray://")):
        raise ClusterError(
            f"--address must be `auto` or HOST:PORT of the cluster's head; found {hide_passwords(address)}: doctor "
            "looks from a node; run it on the head with --address auto"
        )
    document = None if spec is None else load_spec(spec)
    return examine(document, Home.open(), address, say=lambda text: click.echo(f"{text} …", err=True))


def _print_json(checks: Sequence[Check]) -> None:
    from services.words import print_json
    from sweeps.checkup import counts

    print_json({"checks": [asdict(check) for check in checks], "summary": counts(checks)})


def print_checks(checks: Sequence[Check]) -> None:
    """Prints checks by node, those of none at the end, and how many came out how."""
    from sweeps.checkup import EVERYWHERE, summary

    width = max((len(check.name) for check in checks), default=0)
    nodes = sorted({check.node: None for check in checks}, key=lambda node: node == EVERYWHERE)
    for node in nodes:
        click.echo(node or "for all")
        for check in checks:
            if check.node == node:
                click.echo(f"  {check.status:<7}  {check.name:<{width}}  {check.found}")
                if check.way_out:
                    click.echo(f"  {'':<7}  {'':<{width}}  -> {check.way_out}")
        click.echo()
    click.echo(summary(checks))


def _leave(code: int) -> None:
    """Ends the program, also where a question is still without an answer."""
    if any(thread.name.startswith("doctor-") for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
