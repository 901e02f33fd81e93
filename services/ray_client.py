"""Ray's Jobs API as the service and `run --address http://HEAD:8265` use it: bounded, with errors that say the way out.

    address   of the head's dashboard: http://HEAD:8265
    metadata  `lora_sweeps.sweep`: by it the jobs of a sweep are found again, whoever has lost their handles
    attempt   the number that a submission id ends with

Nobody here connects to Ray as a driver does; a head that dies takes nobody with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sweeps.errors import ClusterError
from sweeps.secrecy import hide_passwords

SWEEP = "lora_sweeps.sweep"
"""Key in a job's metadata: the sweep that it drives."""

OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""What Ray's own client follows in place of the address that it is given."""

GRACE_S = 60
"""How long an interrupted driver has to end in order, before Ray kills it."""

NOT_FOUND = 127
"""A shell's exit code where there is no such program."""

RAYS_OWN_LINES = ("Runtime env is setting up", "Running entrypoint for job")
"""What Ray itself puts into a job's log, around what the job says."""

TIMEOUT_S = (3.05, 20.0)
"""For a connection and for an answer; Ray's own client would wait for ever."""

_CLIENT_PORT = 10001
"""Where a head has its Ray Client server, if it was not told otherwise."""

_UPLOAD_S = 600.0
"""The same where files are sent, in which a socket's timeout is for all of them together."""

_SHOWN_LENGTH = 400

_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


@contextmanager
def asking(address: str, *, whose: str) -> Iterator[None]:
    """Makes a ClusterError of whatever goes wrong while a cluster is asked.

    Args:
        address: of its dashboard.
        whose: who needs the token, and what is to be done once it is set.
    """
    from ray.exceptions import AuthenticationError

    shown = hide_passwords(address)
    try:
        yield
    except AuthenticationError as error:
        # Its own words follow, in several sentences, for a person at a keyboard.
        raise ClusterError(
            f"the Ray cluster at {shown} lets in whoever has its token; {brief(error.message)}; set "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) {whose}"
        ) from None
    except ClusterError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise ClusterError(
            f"the Ray cluster at {shown} must answer and do as asked; found: {brief(str(error))}; start its "
            "head (`ray start --head --include-dashboard=true`), or correct the address"
        ) from error


def connect(address: str) -> Any:
    """Ray's client of the Jobs API, which waits for no answer for ever."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client, which waits for no answer longer than `TIMEOUT_S`."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            timeout = (_UPLOAD_S, _UPLOAD_S) if method == "PUT" else TIMEOUT_S
            return super()._do_request(method, endpoint, **({"timeout": timeout} | options))

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    return BoundedClient(address)


def job_of(client: Any, handle: str) -> Any:
    """What Ray knows of a job; None where it knows none by that name."""
    try:
        return client.get_job_info(handle)
    except RuntimeError as error:
        if says_unknown(error):
            return None
        raise


def says_unknown(error: RuntimeError) -> bool:
    """Whether Ray says that there is no such job."""
    # Not any 404: a proxy answers so where the head behind it is away.
    return str(error).startswith("Request failed with status code 404") and "does not exist" in str(error)


def jobs_of(client: Any, sweep: str) -> list[Any]:
    """The jobs that drove a sweep, and the one that does."""
    return [job for job in client.list_jobs() if job.submission_id and (job.metadata or {}).get(SWEEP) == sweep]


def next_attempt(jobs: list[Any]) -> int:
    """The number of a sweep's next job."""
    return 1 + max(map(_attempt, jobs), default=0)


def _attempt(job: Any) -> int:
    number = str(job.submission_id).rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def running(jobs: list[Any]) -> str | None:
    """The submission id of the job that runs, or waits for its start; None where none does."""
    return next((str(job.submission_id) for job in jobs if not job.status.is_terminal()), None)


def said_by_shell(message: str) -> str:
    """What stands in Ray's own log of a job: nothing of the driver, but why its shell could not start it, say.

    Ray puts lines of its own around that, before or after.
    """
    log = message.partition("last available logs")[2].partition("\n")[2]
    return "\n".join(line for line in log.splitlines() if not any(own in line for own in RAYS_OWN_LINES)).strip()


def brief(text: str) -> str:
    """The first and the last line of a text: a traceback says what it is in the one and why in the other."""
    lines = [line.strip().rstrip(".") for line in hide_passwords(text).splitlines() if line.strip()] or [""]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1])))[:_SHOWN_LENGTH]


# -- what is sent with a job -------------------------------------------------------------------------------------------

MOST_SENT_BYTES = 100 * 2**20
"""What Ray's dashboard takes of files (`DASHBOARD_CLIENT_MAX_SIZE` in ray_constants.py), uncompressed."""

_ENTRY_BYTES = 256
"""At most, what a ZIP has of a file beside its name, which it has twice, and its content."""


def files_sent(directory: Path, excludes: list[str]) -> dict[str, int]:
    """The files that Ray would send of a directory, and their bytes in a ZIP; no more than are too many.

    Args:
        directory: to be sent.
        excludes: patterns as in a .gitignore; what .gitignore, .rayignore and Ray itself leave out comes on top.

    Raises:
        OSError: a file cannot be looked at.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: dict[str, int] = {}
    total = 0

    class EnoughError(Exception):
        """More than can be sent."""

    def look(path: Path) -> None:
        nonlocal total
        if path.is_file():
            name = str(path.relative_to(directory))
            found[name] = size = path.stat().st_size + 2 * len(name.encode()) + _ENTRY_BYTES
            total += size
            if total > MOST_SENT_BYTES:
                raise EnoughError

    quiet = logging.getLogger("lora-sweeps.files-sent")
    quiet.setLevel(logging.CRITICAL)
    honoured = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    patterns = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    with suppress(EnoughError):
        _dir_travel(directory, [_get_excludes(directory, patterns)], look, include_gitignore=honoured, logger=quiet)
    return found


# -- a job's log -------------------------------------------------------------------------------------------------------


def tail(client: Any, job: str, take: Callable[[int, str], int], *, silence_s: float) -> None:
    """Follows a job's log from its beginning, until the job ends, the connection does, or nothing comes for a while.

    Args:
        client: from `connect`.
        job: its submission id.
        take: is given the offset and the text of each piece, and returns the offset of the next.
        silence_s: after which the connection may be a dead one.

    Raises:
        Exception: whatever a connection that breaks raises.
    """

    async def follow() -> None:
        known, pieces = 0, client.tail_job_logs(job)
        with suppress(StopAsyncIteration, TimeoutError):
            while True:
                known = take(known, await asyncio.wait_for(anext(pieces), silence_s))

    asyncio.run(follow())


def dashboard_of(address: str) -> str:
    """The address of a cluster's dashboard, asked for at its Ray Client server.

    Args:
        address: ray://HEAD, or ray://HEAD:10001.

    Raises:
        OSError, RuntimeError: it does not answer, or has another version of Ray or Python.
        ValueError: that is no address.
    """
    import ray

    host, port = client_server(address)
    socket.create_connection((host, port), timeout=TIMEOUT_S[0]).close()  # Ray waits much longer
    host = f"[{host}]" if ":" in host else host
    with ray.init(f"ray://{host}:{port}", logging_level=logging.ERROR, log_to_driver=False) as context:
        dashboard = str(context.dashboard_url)
    its_host, _, its_port = dashboard.rpartition(":")
    # A head calls itself by the name that it listens on, which may lead nowhere from here.
    return f"http://{host if its_host in _NOT_FROM_HERE else its_host}:{its_port}"


def client_server(address: str) -> tuple[str, int]:
    """Host and port of a Ray Client server.

    Raises:
        ValueError: this is no address of one.
    """
    parts = urllib.parse.urlsplit(address)
    if not parts.hostname:
        raise ValueError(f"{address} names no host, as ray://HEAD:{_CLIENT_PORT} does")
    return parts.hostname, parts.port or _CLIENT_PORT


_NOT_FROM_HERE = ("127.0.0.1", "localhost", "0.0.0.0", "::", "[::]", "::1", "[::1]")
