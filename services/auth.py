"""Tokens and what their holders may do. Pure: no database, no HTTP.

A token is `lsw_ID_SECRET`. ID finds its row; SECRET has 256 bits from the system's generator, and only its SHA-256 is
stored: a secret that cannot be guessed needs no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Literal

Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "submit", "admin")
"""Each may do what those before it may. read: see; submit: also start, cancel, resume; admin: all users' sweeps too."""

_TOKEN = re.compile(r"lsw_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        user: whose sweeps are theirs.
        scope: what they may do.
        token: id of the token that they showed.
    """

    user: str
    scope: Scope
    token: str

    def may(self, scope: Scope) -> bool:
        """Whether their scope reaches as far as another."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made: the only moment at which its text is known."""

    id: str
    text: str
    sha256: str


def make_token() -> NewToken:
    """Makes a token."""
    token, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return NewToken(token, f"lsw_{token}_{secret}", digest(secret))


def digest(secret: str) -> str:
    """SHA-256 of a secret, in hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def split(text: str) -> tuple[str, str] | None:
    """The id and the secret of a token's text; None for what is none."""
    match = _TOKEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def matches(secret: str, sha256: str) -> bool:
    """Whether a secret has this hash, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(digest(secret), sha256)


def is_user_name(name: str) -> bool:
    """Whether a name can be a user's: 1 to 64 letters, digits, dots, dashes, underscores and @."""
    return _USER.fullmatch(name) is not None
