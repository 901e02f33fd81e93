"""A PostgreSQL server of its own for a test: made in a temporary directory, on loopback, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def binary(name: str) -> str:
    """Where one of PostgreSQL's programs is; skips the test where it is not installed."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[str]:
    """A server for as long as the context lasts; yields the URL of an empty database, password and all."""
    password = secrets.token_hex(16)
    data, socket_directory = directory / "data", directory / "socket"
    for path in (directory, data, socket_directory):
        path.mkdir(exist_ok=True, mode=0o700)
    (directory / "password").write_text(password)
    user = _unprivileged()
    if user is not None:
        for path in (directory, *directory.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
        for parent in directory.parents:  # pytest's own are 0700
            with contextlib.suppress(PermissionError):
                os.chmod(parent, os.stat(parent).st_mode | 0o011)
    port = free_port()

    def run(*arguments: str) -> None:
        given = {"user": user.pw_uid, "group": user.pw_gid} if user else {}
        done = subprocess.run(arguments, cwd=directory, capture_output=True, text=True, **given)
        assert done.returncode == 0, done.stderr

    run(binary("initdb"), "-D", str(data), "-U", "lora", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync",
        f"--pwfile={directory / 'password'}")  # fmt: skip
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={socket_directory} -c fsync=off"
    run(binary("pg_ctl"), "-D", str(data), "-w", "-l", str(directory / "log"), "-o", options, "start")
    try:
        yield f"postgresql://lora:{password}@127.0.0.1:{port}/postgres"
    finally:
        run(binary("pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom the server runs as: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("PostgreSQL refuses to run as root, and there is no other user")
