"""Tokens on a client's disk: lines `SERVER TOKEN` in files that only their owner can read.

A token is only ever sent to the server that it stands beside. Looked up in the state directory, where `serve` puts the
first one, and then in the user's configuration directory, where `lora-sweeps login` puts one.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import urlsplit

from lora_core.files import write_atomically
from sweeps.errors import InputError

SERVER, TOKEN, TOKEN_FILE = "LORA_SWEEPS_SERVER", "LORA_SWEEPS_TOKEN", "LORA_SWEEPS_TOKEN_FILE"

_PORTS = {"http": 80, "https": 443}
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,500}")


def files(state: Path) -> list[Path]:
    """Where tokens may lie, the first one first."""
    return [own_file()] if os.environ.get(TOKEN_FILE) else [state / "tokens", own_file()]


def own_file() -> Path:
    """Where the user keeps tokens: the file that the environment names, else one in the configuration directory."""
    if named := os.environ.get(TOKEN_FILE):
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "lora-sweeps" / "tokens"


def token_for(server: str, state: Path) -> str | None:
    """The token for a server: from the environment, else from a file; None where there is none.

    Raises:
        InputError: a file with tokens can be read by others, or not at all; or this is no text of a token.
    """
    if text := os.environ.get(TOKEN, "").strip():
        return checked(text)
    for path in files(state):
        if (found := read(path).get(origin(server))) is not None:
            return checked(found)
    return None


def checked(token: str) -> str:
    """A token's text, which can stand in a header.

    Raises:
        InputError: it cannot.
    """
    if not _PRINTABLE.fullmatch(token):  # which is not shown: it may be a secret, mistyped
        raise InputError("a token must be printable ASCII without spaces (lsw_...); found something else; copy it anew")
    return token


def read(path: Path) -> dict[str, str]:
    """The tokens of a file, by server; none where there is no such file.

    Raises:
        InputError: it can be read by others, or not at all, or holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise InputError(
                    f"a file with tokens must be its owner's alone (mode 0600); {path} has {mode:04o}; `chmod 600` it, "
                    "and have tokens replaced that others may have read"
                )
            lines = [line.split() for line in file if line.strip()]
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"a file with tokens must be readable; {path} is not: {error}") from None
    if wrong := next((n for n, parts in enumerate(lines, start=1) if len(parts) != 2), None):
        raise InputError(f"{path}:{wrong}: required `SERVER TOKEN`; found something else")
    return {origin(server): token for server, token in lines}


def save(path: Path, server: str, token: str) -> None:
    """Puts the token for a server into a file, which is made where it is missing.

    Raises:
        InputError: it cannot be written, or is no file of tokens.
    """
    tokens = read(path) | {origin(server): token}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{one} {text}\n" for one, text in tokens.items()).encode())
    except OSError as error:
        raise InputError(f"a file with tokens must be writable; {path} is not: {error.strerror or error}") from None


def origin(server: str) -> str:
    """A server's scheme, host and port, as a token is bound to them.

    Raises:
        InputError: this is no address of a server.
    """
    try:
        parts = urlsplit(server)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        parts, port = urlsplit(""), None
    if not (parts.scheme in _PORTS and parts.hostname and port) or "@" in parts.netloc or parts.query or parts.fragment:
        shown = server.rpartition("@")[2]  # what stands before it may be a secret
        raise InputError(f"a server must be http://HOST:PORT or https://HOST; found {shown!r}")
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
