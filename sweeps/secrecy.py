"""Secrets in addresses: found and masked, wherever an address is shown, logged or stored. Pure.

userinfo    `scheme://name:SECRET@host`; a name alone too (`https://TOKEN@host`), but for a database's user
parameters  `password=SECRET`, `sslpassword=`, `token=` and their like: in a query, in a DSN, in an ODBC string
"""

from __future__ import annotations

import re

MASK = "***"
"""Stands in the place of a secret."""

_DATABASE = r"(?<![\w+.-])(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle|sqlite)(?:\+\w+)?://"

_DATABASE_USERINFO = re.compile(rf"""({_DATABASE}[^\s/:@"'<>]*):[^\s"'<>]{{1,2000}}@""", re.IGNORECASE)
"""Passwords are taken up to the last @: SQLAlchemy takes a slash in one. The bound keeps a hostile text linear."""

_OTHER_USERINFO = re.compile(
    rf"""(?!{_DATABASE})(?<![\w+.-])([a-z][a-z0-9+.-]{{0,30}}://)"""
    r"""(?:[^\s/:@"'<>]*:[^\s"'<>]{0,2000}|[^\s/:@?\#"'<>]{1,2000})@""",
    re.IGNORECASE,
)

_PARAMETER = re.compile(
    r"""
    (?<![\w-])
    ([\w-]*(?:passw(?:or)?d|passphrase|pass|pwd|token|secret(?:[_-]?(?:access[_-]?)?key)?|api[_-]?key|access[_-]?key|account[_-]?key
              |private[_-]?key|credentials?|signature|sig)
    \s?(?:=|%3D)\s?)                                             # %3D: an ODBC string within a query
    (?:'[^']+'|"[^"\s,:{}\[\]]+"|[^\s&;\#"'<>]+)                 # not JSON's `"", "next": …`
    """,
    re.IGNORECASE | re.VERBOSE,
)


def hide_passwords(text: str) -> str:
    """The text with `MASK` for every secret in the addresses and connection strings that it holds.

    It may hide what is no secret, where an address can be read in two ways; what it has hidden it leaves alone.
    """
    text = _DATABASE_USERINFO.sub(rf"\1:{MASK}@", text)
    text = _OTHER_USERINFO.sub(rf"\1{MASK}@", text)
    return _PARAMETER.sub(rf"\1{MASK}", text)


def has_secret(uri: str) -> bool:
    """Whether an address holds a secret, which must then come from the environment and be stored nowhere."""
    return hide_passwords(uri) != uri
