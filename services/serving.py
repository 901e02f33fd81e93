"""`lora-sweeps serve`: puts the parts of the service together, and runs them."""

from __future__ import annotations

import fcntl
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sweeps.errors import InputError, StateError

if TYPE_CHECKING:
    from services.settings import Settings
    from services.store import Store
    from sweeps.home import Home

_LOG = logging.getLogger("lora_sweeps")

_TICK_S = 0.5
_SHUTDOWN_S = 5


@click.command()
@click.option("--host", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default: 8321; 0: any).")
@click.option("--devices", type=int, help="GPUs, or cores, for all sweeps together (default: this machine's).")
@click.option("--models", type=click.Path(path_type=Path), help="Directory of the models that specs may name.")
@click.option("--data", type=click.Path(path_type=Path), help="Directory of the data that specs may name.")
@click.option("--with-mlflow", is_flag=True, default=None, help="Run an MLflow server beside it, on loopback.")
@click.option("--mlflow-port", type=int, help="Its port (default: 5000).")
@click.option("--ray-address", metavar="URL", help="Run sweeps as Ray jobs of this cluster (http://HEAD:8265).")
@click.option("--behind-proxy", is_flag=True, default=None, help="A proxy in front of it has TLS.")
@click.option("--tls-certificate", type=click.Path(path_type=Path), help="PEM file with its certificate.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM file with its key.")
def serve(**options: Any) -> None:
    """Run the service: people submit sweeps to it, and it queues and runs them.

    Everything that can be set is in docs/service.md, as variables LORA_SWEEPS_*.
    """
    from services.settings import read_settings
    from sweeps.home import Home

    settings = read_settings(options)
    home = Home.open()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    with _alone(home), home.ledger() as ledger:
        from services.store import Store

        store = Store(ledger)
        _check_exposure(settings, store)
        with _mlflow(settings, home) as mlflow, _listening(settings) as listener:
            url = f"{'https' if settings.tls_certificate else 'http'}://{_named(listener)}"
            first = _first_token(store, home, url)
            service, supervisor, environment = _assemble(settings, home, ledger, store, mlflow)
            _say(service, url, first, mlflow)
            try:
                _run(service, supervisor, settings, listener, mlflow)
            finally:
                service.planner.close()
        _say_what_goes_on(store)


def _check_exposure(settings: Settings, store: Store) -> None:
    """Refuses to listen beyond this machine without tokens, and without anybody who encrypts."""
    if settings.on_loopback:
        return
    if not any(row.valid(time.time()) for row in store.tokens()):
        raise InputError(
            f"beyond loopback the service listens only once there are tokens; found none for {settings.host}: make one "
            "with `lora-sweeps token create --user NAME --scope admin`"
        )
    if settings.tls_certificate is None and not settings.behind_proxy:
        raise InputError(
            f"beyond loopback tokens must not travel in clear; found {settings.host} without TLS: set --tls-certificate "
            "and --tls-key, or --behind-proxy where a proxy in front has it"
        )


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """One service looks after a state directory."""
    with (home.path / "service.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(f"one service looks after a state directory; another one has {home.path} now") from None
        yield


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"the service must be able to listen on {settings.host} port {settings.port}; it cannot: {error}; set --port"
        ) from None
    with listener:
        yield listener


def _named(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
