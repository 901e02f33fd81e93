"""`lora-sweeps serve`: puts the parts of the service together, and runs them until it is told to stop."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from sweeps.errors import InputError, StateError

if TYPE_CHECKING:
    from services.mlflow_server import MlflowServer
    from services.planning import Planner
    from services.runner import Runner
    from services.service import Service
    from services.settings import Settings
    from services.store import Store
    from sweeps.home import Home
    from sweeps.ledger import Ledger

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

    All that can be set is in docs/service.md, as variables LORA_SWEEPS_*.
    """
    from services.planning import clear_scratch
    from services.settings import read_settings
    from services.store import Store
    from sweeps.home import Home

    settings, home = read_settings(options), Home.open()
    home.path.chmod(0o700)  # tokens are in it, and Ray's own
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    with _alone(home), home.ledger() as ledger, ledger.database.alone("service"):
        store = Store(ledger)
        _check_exposure(settings, store)
        clear_scratch(home)
        with _listening(settings) as listener, _mlflow(settings, home) as mlflow:
            url = f"{'https' if settings.tls_certificate else 'http'}://{_named(listener)}"
            _say_first_token(store, home, url)
            with _planner(settings, home) as planner:
                service = _assemble(settings, home, ledger, store, planner, mlflow)
                click.echo(f"serving {url}; state in {home.path}; Ctrl-C stops it, and not the sweeps", err=True)
                _run(service, settings, listener, mlflow)
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
            f"beyond loopback tokens must not travel in clear; found {settings.host} without TLS: set "
            "--tls-certificate and --tls-key, or --behind-proxy where a proxy in front has it"
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
        where = f"{settings.host} port {settings.port}"
        raise InputError(
            f"the service must be able to listen on {where}; it cannot: {error}; choose another --host or --port"
        ) from None
    with listener:
        yield listener


def _named(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say_first_token(store: Store, home: Home, url: str) -> None:
    """Lets whoever has the state directory use the service on this machine without further ado."""
    from services import credentials
    from services.access import row_of
    from services.auth import make_token
    from services.store import AuditEntry
    from services.tokens import own_name

    path = home.path / "tokens"
    saved = [text for text in credentials.read(path).values() if row_of(store, text) is not None]
    if saved:
        credentials.save(path, url, saved[0])
    elif not any(row.valid(time.time()) for row in store.tokens()):
        user, token = own_name(), make_token()
        made = AuditEntry(user, "token create", detail=f"{token.id} for {user}, scope admin: the first one")
        store.add_token(token, user=user, scope="admin", note="the first one", expires_at_s=None, audit=made)
        credentials.save(path, url, token.text)
        click.echo(f"made a first token, scope admin, for {user}: {path} (mode 0600)", err=True)


@contextmanager
def _mlflow(settings: Settings, home: Home) -> Iterator[MlflowServer | None]:
    if not settings.with_mlflow:
        yield None
        return
    from services.mlflow_server import MlflowServer

    click.echo(f"starting MLflow on port {settings.mlflow_port}", err=True)
    hosts = () if settings.mlflow_url is None else (_host_of(settings.mlflow_url),)
    server = MlflowServer(home, port=settings.mlflow_port, database=_mlflow_database(settings), hosts=hosts)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _mlflow_database(settings: Settings) -> str | None:
    return settings.mlflow_database.get_secret_value() if settings.mlflow_database else None


def _host_of(url: str) -> str:
    """The host and port of an address, as a browser names them."""
    return urlsplit(url).netloc.rpartition("@")[2]


@contextmanager
def _planner(settings: Settings, home: Home) -> Iterator[Planner]:
    from services.planning import Planner

    planner = Planner(home, processes=settings.planners, limit_s=settings.planning_s)
    try:
        yield planner
    finally:
        planner.close()


def _assemble(
    settings: Settings, home: Home, ledger: Ledger, store: Store, planner: Planner, mlflow: MlflowServer | None
) -> Service:
    from services.queue import Rules
    from services.reading import Records
    from services.runner import gpus_of_this_machine
    from services.service import Service
    from services.supervisor import Policy, Supervisor
    from sweeps.storage import configured_place
    from sweeps.tracking_address import absolute_uri, default_uri

    given = settings.tracking_uri.get_secret_value() if settings.tracking_uri else os.environ.get("MLFLOW_TRACKING_URI")
    uri = absolute_uri(mlflow.uri if mlflow else given or default_uri(home.path))
    devices = settings.devices or asyncio.run(planner.devices())
    rules = Rules(devices, settings.user_running, settings.user_device_hours, settings.weights)
    gpus = gpus_of_this_machine() if settings.ray_address is None else ()
    policy = Policy(rules, window_s=settings.window_hours * 3600, cancel_s=settings.cancel_s, gpus=gpus)
    records = Records(ledger)
    supervisor = Supervisor(store, ledger, records, _runner(settings, home, uri), policy)
    return Service(
        settings,
        home,
        ledger,
        store,
        records,
        planner,
        supervisor,
        devices=devices,
        tracking_uri=uri,
        checkpoints=configured_place() or "",
    )


def _runner(settings: Settings, home: Home, uri: str) -> Runner:
    if settings.ray_address is None:
        from services.runner import LocalRunner

        # What is trained lies under the administrator's roots: nothing is fetched from a hub.
        return LocalRunner(home, {"MLFLOW_TRACKING_URI": uri, "HF_HUB_OFFLINE": "1"})
    if settings.devices is None:
        raise InputError("on a cluster --devices must say how many GPUs all sweeps together may use; found none")
    if settings.with_mlflow and not _is_here(settings.ray_address):
        raise InputError(
            f"--with-mlflow listens on loopback, where drivers at {settings.ray_address} do not reach it: start MLflow "
            "where they do, and set LORA_SWEEPS_TRACKING_URI"
        )
    from services.ray_jobs import RayJobsRunner

    return RayJobsRunner(settings.ray_address, home)


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _run(service: Service, settings: Settings, listener: socket.socket, mlflow: MlflowServer | None) -> None:
    import uvicorn

    from services.api import make_app
    from services.streaming import Hub

    hub = Hub(service.ledger, service.shown)
    server: uvicorn.Server | None = None

    async def look_after() -> None:
        assert server is not None
        while not server.should_exit:
            await asyncio.to_thread(_look, service, mlflow)
            await asyncio.sleep(_TICK_S)
        hub.close()  # else its listeners would keep the server up

    config = uvicorn.Config(
        make_app(service, hub, look_after),
        log_level="warning",
        proxy_headers=settings.behind_proxy,
        forwarded_allow_ips=list(settings.proxies),
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    server = uvicorn.Server(config)
    with _asked_to_stop_only():
        server.run(sockets=[listener])


@contextmanager
def _asked_to_stop_only() -> Iterator[None]:
    """Lets uvicorn handle Ctrl-C and SIGTERM, and nobody else: it raises them once more when it has stopped."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look(service: Service, mlflow: MlflowServer | None) -> None:
    """Looks after the queue, and after MLflow; whatever goes wrong is tried again at the next look."""
    try:
        service.supervisor.tick()
        service.looked_at_s = time.monotonic()
    except InputError as error:
        _LOG.error("the queue could not be looked after; tried again: %s", error)
    except Exception:
        _LOG.exception("the queue could not be looked after; tried again")
    try:
        if mlflow is not None:
            mlflow.check()
    except Exception:
        _LOG.exception("MLflow could not be looked after; tried again")


def _say_what_goes_on(store: Store) -> None:
    from services.store import DRIVEN

    going = [row.sweep for row in store.in_states(*DRIVEN)]
    if going:
        click.echo(
            f"stopped; {', '.join(going)} go on without the service, which finds them again when it is started",
            err=True,
        )
