"""`lora-sweeps token`: who may use the service of this state directory. `lora-sweeps login`: keeps a token.

A token is shown once, when it is made. What is kept of it cannot be turned back into it.
"""

from __future__ import annotations

import getpass
import math
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from services.auth import SCOPES, Scope, is_user_name, make_token
from services.options import AS_JSON, SERVER
from sweeps.errors import InputError

if TYPE_CHECKING:
    from services.store import TokenRow

_DEFAULT_SERVER = "http://127.0.0.1:8321"
_MOST_DAYS = 36_500
_DAY_S = 86_400
_ID = re.compile(r"[0-9a-f]{12}")
_NOTE = re.compile(r"[^\x00-\x1f\x7f]{0,200}")


@click.group()
def token() -> None:
    """Make, list and revoke the tokens of the service of this state directory."""


@token.command()
@click.option("--user", required=True, metavar="NAME", help="Whose sweeps the token's are.")
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="submit",
    help="read: see; submit (the default): also start, cancel, resume; admin: all users' sweeps too.",
)
@click.option("--note", default="", help="What it is for.")
@click.option("--expires", "days", type=click.FloatRange(0, _MOST_DAYS, min_open=True), metavar="DAYS")
@click.option(
    "--save",
    "server",
    is_flag=False,
    flag_value=_DEFAULT_SERVER,
    metavar="[URL]",
    help=f"Put it into your own file for this server (default: {_DEFAULT_SERVER}), and do not print it.",
)
def create(user: str, scope: Scope, note: str, days: float | None, server: str | None) -> None:
    """Make a token, and print it: once, on stdout."""
    from services import credentials
    from services.store import AuditEntry, Store
    from sweeps.home import Home

    if not is_user_name(user):
        required = "1 to 64 letters, digits, dots, dashes, underscores and @, the first a letter or digit"
        raise InputError(f"--user must be {required}; found {user!r}")
    if not _NOTE.fullmatch(note):
        raise InputError("--note must be one line of at most 200 characters; found more, or others")
    if days is not None and math.isnan(days):  # which click takes for a number in every range
        raise InputError(f"--expires must be a number of days, at most {_MOST_DAYS:,}; found nan")
    if server is not None:
        credentials.origin(server)  # or it says what is wrong with it, before there is a token
        credentials.read(credentials.own_file())
    made, expires_at_s = make_token(), None if days is None else time.time() + days * _DAY_S
    with Home.open().ledger() as ledger:
        audit = AuditEntry(own_name(), "token create", detail=f"{made.id} for {user}, scope {scope}")
        Store(ledger).add_token(made, user=user, scope=scope, note=note, expires_at_s=expires_at_s, audit=audit)
    until = "" if expires_at_s is None else f", until {_utc(expires_at_s)} UTC"
    click.echo(f"made token {made.id} for {user}, scope {scope}{until}; `lora-sweeps token revoke {made.id}`", err=True)
    if server is None:
        click.echo("it is shown this once only; `lora-sweeps login` keeps it in its user's file", err=True)
        click.echo(made.text)
    else:
        credentials.save(credentials.own_file(), server, made.text)
        click.echo(f"saved for {credentials.origin(server)} in {credentials.own_file()} (mode 0600)", err=True)


@token.command(name="list")
@AS_JSON
def list_tokens(as_json: bool) -> None:
    """List all tokens, oldest first: everything but their secrets."""
    from services.store import Store
    from services.words import print_json, print_table
    from sweeps.home import Home

    home, rows = Home.locate(), []
    if home.has_ledger:
        with home.ledger() as ledger:
            rows = [_shown(row) for row in Store(ledger).tokens()]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("no tokens yet: make one with `lora-sweeps token create --user NAME`", err=True)
    else:
        columns = ("id", "user", "scope", "state", "created", "expires", "note")
        heads = ("id", "user", "scope", "state", "created (UTC)", "expires (UTC)", "note")
        print_table([heads, *(tuple(row[column] or "–" for column in columns) for row in rows)])


@token.command()
@click.argument("id")
def revoke(id: str) -> None:
    """Make a token open nothing from now on."""
    from services.store import AuditEntry, Store
    from sweeps.home import Home

    if not _ID.fullmatch(id):  # not shown: it may be the whole token
        raise InputError("a token must be named by its id, 12 hexadecimal digits; `lora-sweeps token list` has them")
    home = Home.locate()
    if not home.has_ledger:
        raise InputError(f"{home.path} has no tokens: set LORA_SWEEPS_HOME to the service's state directory")
    with home.ledger() as ledger:
        store = Store(ledger)
        row = store.token(id)
        if row is None:
            raise InputError(f"a token must be one of this service's; found {id}; `lora-sweeps token list` has them")
        if not store.revoke_token(id, AuditEntry(own_name(), "token revoke", detail=f"{id} of {row.user}")):
            click.echo(f"token {id} of {row.user} had been revoked before", err=True)
            return
    click.echo(f"revoked token {id} of {row.user}: it opens nothing from now on", err=True)


@click.command()
@SERVER
def login(server: str | None) -> None:
    """Keep a token of yours for a service in your own file, readable by you alone.

    The token is asked for without echo, or read from stdin where that is no terminal.
    """
    from services import credentials
    from services.client import Client
    from sweeps.home import Home

    if server is None:
        raise click.UsageError("login needs a service: --server URL, or LORA_SWEEPS_SERVER.")
    own, bound_to = credentials.own_file(), credentials.origin(server)
    credentials.read(own)  # or it says what is wrong with it, before a token is asked for
    terminal = sys.stdin.isatty()
    text = click.prompt(f"token for {bound_to}", hide_input=True, err=True) if terminal else sys.stdin.readline()
    with Client(server, credentials.checked(text.strip())) as client:
        client.ready()
    credentials.save(own, server, text.strip())
    click.echo(f"saved for {bound_to} in {own} (mode 0600)", err=True)
    if os.environ.get(credentials.TOKEN):
        click.echo(f"note: {credentials.TOKEN} is set, and goes first", err=True)
    first = credentials.files(Home.locate().path)[0]
    if first != own and bound_to in credentials.read(first):
        click.echo(f"note: in this directory {first} goes first, which has a token for it too", err=True)


def own_name() -> str:
    """The name that the system has for us, as far as it can be a user's here."""
    try:
        name = re.sub(r"[^A-Za-z0-9._@-]", "-", getpass.getuser())
    except (KeyError, OSError):  # a user id without a name, as in containers
        name = "admin"
    return name if is_user_name(name) else "admin"


def _shown(row: TokenRow) -> dict[str, Any]:
    """A token without its secret, and without the hash of it."""
    state = "revoked" if row.revoked_at_s is not None else "valid" if row.valid(time.time()) else "expired"
    return {
        "id": row.id,
        "user": row.user,
        "scope": row.scope,
        "note": row.note,
        "created": _utc(row.created_at_s),
        "expires": None if row.expires_at_s is None else _utc(row.expires_at_s),
        "state": state,
    }


def _utc(at_s: float) -> str:
    from services.views import utc

    return utc(at_s)[:19]
