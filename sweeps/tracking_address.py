"""Where MLflow is: tracking URIs as people write them, and whether they can be used. Never imports mlflow."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shlex
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from sweeps.errors import TrackingError
from sweeps.secrecy import hide_passwords

_PROBE_TIMEOUT_S = 8.0

_STORES = {
    "s3": ("boto3", "boto3"),
    "gs": ("google-cloud-storage", "google.cloud.storage"),
    "wasbs": ("azure-storage-blob", "azure.storage.blob"),
}
"""By the scheme of an artifact location, what MLflow's client writes there with: a package and its module."""

_KINDS = "sqlite:///PATH, postgresql://, mysql://, mssql://, http:// or https://"


def default_uri(directory: Path) -> str:
    """The tracking URI of a working directory: the database that MLflow itself would use there."""
    return f"sqlite:///{directory.absolute() / 'mlflow.db'}"


def absolute_uri(uri: str) -> str:
    """The URI with a relative path of a SQLite file made absolute, so that it means the same from everywhere."""
    path = _sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path.absolute()}"


def open_command(uri: str) -> str:
    """The command, or for a server the address, that opens MLflow on a tracking URI."""
    if _is_server(uri):
        return shown_address(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(hide_passwords(absolute_uri(uri)))}"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page; for a database, where `open_command` serves it."""
    root = shown_address(uri) if _is_server(uri) else "http://127.0.0.1:5000"
    return f"{root}/#/experiments/{experiment_id}/runs/{run_id}"


def check_address(uri: str, experiment: str | None, *, ask_client: Callable[[str, str, str], None]) -> None:
    """Finds out within seconds, and without leaving a trace, whether a tracking URI can be used.

    Args:
        uri: MLflow's tracking URI.
        experiment: the experiment to be written; None where it is not known yet.
        ask_client: asks a server that wants credentials, through MLflow's client: its URI, an experiment, and what it
            answered without them.

    Raises:
        TrackingError: it cannot, as far as can be seen without writing.
    """
    path = _sqlite_path(uri)
    if not _is_well_formed(uri):
        _refuse_scheme(uri)
    elif path is not None:
        _check_sqlite(path, experiment)
    elif _is_server(uri):
        _check_server(uri, experiment or "Default", ask_client)
    elif re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri):
        _check_database(uri)
    else:
        _refuse_scheme(uri)


def _refuse_scheme(uri: str) -> None:
    shown = hide_passwords(uri)
    if uri.startswith("file:") or "://" not in uri:
        raise TrackingError(
            f"tracking.uri must be {_KINDS}; found {shown!r}, a directory of files, which MLflow no longer writes; "
            f"use {default_uri(Path.cwd())}, or convert it with `mlflow migrate-filestore`"
        )
    raise TrackingError(
        f"tracking.uri must be {_KINDS}; found {shown!r}; choose one of these, or leave it out for a file here"
    )


def _check_sqlite(path: Path, experiment: str | None) -> None:
    required = "tracking.uri must name a SQLite file that can be written"
    if str(path) in ("", ".", ":memory:"):
        raise TrackingError(f"{required}; found a database in memory, which nobody could open; use sqlite:///mlflow.db")
    directory = path.absolute().parent
    if not directory.is_dir():
        raise TrackingError(f"{required}; the directory {directory} does not exist; make it with `mkdir -p`")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TrackingError(
            f"{required}; the directory {directory} cannot be written; choose another, or change its mode"
        )
    if path.is_dir():
        raise TrackingError(f"{required}; {path} is a directory; use sqlite:///{path.absolute() / 'mlflow.db'}")
    if not path.exists() or path.stat().st_size == 0:
        return
    if not os.access(path, os.R_OK | os.W_OK):
        raise TrackingError(f"{required}; {path} cannot; choose another, or change its mode")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            schema = (
                _one(connection, "SELECT version_num FROM alembic_version") if "alembic_version" in tables else None
            )
            query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
            found = _one(connection, query, experiment) if "experiments" in tables else None
    except sqlite3.DatabaseError as error:
        raise TrackingError(f"{required}; {path} cannot be read as one: {error}; choose another") from error
    if schema is not None and (newest := _newest_schema()) is not None and schema[0] != newest:
        raise TrackingError(
            f"tracking.uri must name a database of the installed version of MLflow; {path} is of another; back it up, "
            f"then `mlflow db upgrade sqlite:///{path.absolute()}`, or choose another file"
        )
    if found is not None and found[1] == "deleted":
        raise TrackingError(deleted_experiment(str(experiment), str(found[0])))


def _one(connection: sqlite3.Connection, query: str, *values: str | None) -> tuple[Any, ...] | None:
    found: tuple[Any, ...] | None = connection.execute(query, values).fetchone()
    return found


def _newest_schema() -> str | None:
    """The schema of the installed MLflow, read from its migrations without importing it; None if they moved."""
    spec = importlib.util.find_spec("mlflow")
    places = spec.submodule_search_locations if spec is not None else None
    revisions: set[str] = set()
    superseded: set[str] = set()
    for script in Path(next(iter(places or ["nowhere"])), "store", "db_migrations", "versions").glob("*.py"):
        for which, revision in re.findall(r"""^(down_)?revision = ["'](\w+)["']""", script.read_text("utf-8"), re.M):
            (superseded if which else revisions).add(revision)
    newest = revisions - superseded
    return newest.pop() if len(newest) == 1 else None


def _check_database(uri: str) -> None:
    required = f"tracking.uri must name a database that can be reached; {hide_passwords(uri)}"
    import sqlalchemy as sa  # whoever only shows an address needs none

    try:
        url = sa.make_url(uri)
        bounded = url.get_driver_name() in ("psycopg", "psycopg2", "pymysql", "mysqldb")
        engine = sa.create_engine(
            url,
            poolclass=sa.NullPool,  # nothing stays open, whatever happens
            connect_args={"connect_timeout": int(_PROBE_TIMEOUT_S)} if bounded else {},
        )
        with engine.connect():
            pass
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"{required} needs the Python package {error.name}; install it beside lora-sweeps"
        ) from error
    except sa.exc.SQLAlchemyError as error:
        cause = hide_passwords(str(getattr(error, "orig", None) or error).splitlines()[0])
        raise TrackingError(f"{required} cannot: {cause}; start it, or correct the URI") from error


def _check_server(uri: str, experiment: str, ask_client: Callable[[str, str, str], None]) -> None:
    shown = shown_address(uri)
    required = "tracking.uri must name an MLflow server that answers and lets us write"
    try:
        status, answer = _get_experiment(uri, experiment)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if "CERTIFICATE" in str(error):
            ask_client(uri, experiment, str(error))
            return
        cause = hide_passwords(str(getattr(error, "reason", error)))
        raise TrackingError(
            f"{required}; {shown} does not answer: {cause}; start it (`mlflow server`), or correct the address"
        ) from error
    if status in (401, 403):
        ask_client(uri, experiment, f"HTTP {status}")
        return
    _judge(answer, status, shown, experiment)
    if "experiment" not in answer:  # it is going to be made, beside the one that every server has
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            _, answer = _get_experiment(uri, "Default")
    if isinstance(found := answer.get("experiment"), dict):
        check_artifact_location(str(found.get("artifact_location")))


def _get_experiment(uri: str, experiment: str) -> tuple[int, dict[str, Any]]:
    query = urllib.parse.urlencode({"experiment_name": experiment})
    address = f"{_without_userinfo(uri)}/api/2.0/mlflow/experiments/get-by-name?{query}"
    try:
        with urllib.request.urlopen(address, timeout=_PROBE_TIMEOUT_S) as response:
            return response.status, _json(response.read(1_000_000))
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _json(error.read(1_000_000))


def check_artifact_location(location: str) -> None:
    """Finds out whether what MLflow's client needs to write files to a bucket is here.

    Args:
        location: an experiment's; one of a server that passes files on, `mlflow-artifacts:/…`, needs nothing.

    Raises:
        TrackingError: it is not installed.
    """
    scheme = location.partition(":")[0]
    package, module = _STORES.get(scheme, ("", ""))
    if not module:
        return
    try:
        missing = importlib.util.find_spec(module) is None
    except (ModuleNotFoundError, ValueError):
        missing = True
    if missing:
        raise TrackingError(
            "the experiment's files must have a place that can be written from here; they go to "
            f"{hide_passwords(location)}, which needs the Python package {package}; install it beside lora-sweeps, or "
            "start MLflow's server with --serve-artifacts and --artifacts-destination, so that it writes them itself. "
            "An experiment keeps the place it was made with, so then name a new one, of `mlflow experiments create`"
        )


def _judge(answer: dict[str, Any], status: int, shown: str, experiment: str) -> None:
    """What the server's answer to the question for an experiment means."""
    found = answer.get("experiment")
    if isinstance(found, dict):
        if found.get("lifecycle_stage") == "deleted":
            raise TrackingError(deleted_experiment(experiment, str(found.get("experiment_id"))))
    elif answer.get("error_code") != "RESOURCE_DOES_NOT_EXIST":
        raise TrackingError(
            f"tracking.uri must name an MLflow server; {shown} answers HTTP {status}, but not as MLflow does; correct "
            "the address (and the path, behind a proxy)"
        )


def _json(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _is_well_formed(uri: str) -> bool:
    try:
        return urllib.parse.urlsplit(uri).port is None or True
    except ValueError:
        return False


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def shown_address(uri: str) -> str:
    """A server's address for people: no user, no secret, and no slash at its end."""
    return _without_userinfo(hide_passwords(uri))


def _without_userinfo(uri: str) -> str:
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def _sqlite_path(uri: str) -> Path | None:
    match = re.match(r"sqlite(\+\w+)?://(/(?P<path>[^?]*))?", uri)
    return None if match is None else Path(match["path"] or "")


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where artifacts go: beside the database, whoever reads it from wherever; None leaves it to the server."""
    path = _sqlite_path(uri)
    if path is None:
        return None
    return (path.absolute().parent / "mlartifacts" / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()


def deleted_experiment(name: str, experiment_id: str) -> str:
    """What is said of an experiment that lies in MLflow's trash."""
    return (
        f"tracking.experiment must be an experiment that can be written; {name!r} is deleted in MLflow; restore it "
        f"with `mlflow experiments restore -x {experiment_id}`, or choose another name"
    )
