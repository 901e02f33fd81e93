"""A PostgreSQL server of its own for a test: made in a temporary directory, on loopback, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import free_port


def binary(name: str) -> str:
    """Where one of PostgreSQL's programs is; skips the test where it is not installed."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[str]:
    """A server for as long as the context lasts; yields the URL of an empty database, password and all.

    Args:
        directory: names the server for `restart`. What it keeps lies elsewhere: pytest's directories are their owner's
            alone, and the server may be another user.
    """
    password, port, user = secrets.token_hex(16), free_port(), _unprivileged()
    with tempfile.TemporaryDirectory(prefix="lora-sweeps-postgresql-") as name:
        own = _OWN[directory] = Path(name)
        (own / "password").write_text(password)
        for path in (own / "data", own / "socket"):
            path.mkdir(mode=0o700)
        for path in (own, *own.iterdir()) if user else ():
            os.chown(path, user.pw_uid, user.pw_gid)
        _run(
            own,
            "initdb",
            *["-U", "lora", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"],
            f"--pwfile={own / 'password'}",
        )
        settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": own / "socket"}
        with (own / "data" / "postgresql.conf").open("a") as file:  # where another start finds them
            file.writelines(f"{name} = '{value}'\n" for name, value in (settings | {"fsync": "off"}).items())
        start(directory)
        try:
            yield f"postgresql://lora:{password}@127.0.0.1:{port}/postgres"
        finally:
            if (own / "data" / "postmaster.pid").exists():
                kill(directory)


_OWN: dict[Path, Path] = {}


def restart(directory: Path) -> None:
    """Restarts a server: every connection breaks."""
    own = _OWN[directory]
    _run(own, "pg_ctl", "-w", "-m", "fast", "-l", str(own / "log"), "restart")


def kill(directory: Path) -> None:
    """Ends a server at once, without a word to anybody, as a crash does; it is recovered when it is started again."""
    _run(_OWN[directory], "pg_ctl", "-w", "-m", "immediate", "stop")


def start(directory: Path) -> None:
    """Starts a server that was killed."""
    own = _OWN[directory]
    _run(own, "pg_ctl", "-w", "-t", "300", "-l", str(own / "log"), "start")


def _run(own: Path, program: str, *arguments: str) -> None:
    user = _unprivileged()
    done = subprocess.run(
        [binary(program), "-D", str(own / "data"), *arguments],
        cwd=own,
        # A server that was started keeps what it was given, and nobody would see the end of a pipe.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
    )
    assert done.returncode == 0, (own / "log").read_text() if (own / "log").exists() else program


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom the server runs as: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("PostgreSQL refuses to run as root, and there is no other user")
