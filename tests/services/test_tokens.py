"""`lora-sweeps token`: what is printed where, what is kept, and what a token opens once it was made or revoked."""

from __future__ import annotations

import json
import re
import stat
import time
from pathlib import Path

import pytest

from services import credentials
from services.auth import split
from services.client import Client
from services.store import Store
from sweeps.errors import InputError
from sweeps.ledger import Ledger
from tests.services.service_support import Served
from tests.services.test_remote_cli import cli
from tests.support import Here

__all__ = ["cli"]


def test_a_token_is_printed_once_and_kept_as_a_hash(cli: Here):
    made = cli("token", "create", "--user", "alice", "--note", "her laptop", "--expires", "30")
    assert made.code == 0
    text = made.out.removesuffix("\n")
    assert split(text) is not None
    number, secret = split(text) or ("", "")
    assert text not in made.err
    assert secret not in made.err
    assert f"made token {number} for alice, scope submit, until 2" in made.err
    listed = cli("token", "list")
    assert re.search(rf"^{number}  alice  submit  valid  .*  her laptop$", listed.out, re.M)
    (row,) = json.loads(cli("token", "list", "--json").out)
    assert set(row) == {"id", "user", "scope", "note", "created", "expires", "state"}
    assert (row["id"], row["user"], row["scope"], row["state"]) == (number, "alice", "submit", "valid")
    kept = b"".join(path.read_bytes() for path in Path(".lora-sweeps").rglob("*") if path.is_file())
    assert b"alice" in kept
    assert secret.encode() not in kept
    with Ledger.in_directory(Path(".lora-sweeps").absolute()) as ledger:
        (entry,) = Store(ledger).audit(limit=9)
        stored = Store(ledger).token(number)
    assert (entry.action, entry.detail) == ("token create", f"{number} for alice, scope submit")
    assert entry.user
    assert stored is not None
    assert stored.sha256 not in listed.out
    assert stored.expires_at_s == pytest.approx(time.time() + 30 * 86_400, abs=600)


def test_a_token_opens_a_running_service_until_it_is_revoked(cli: Here, served: Served):
    home = {"LORA_SWEEPS_HOME": str(served.home)}
    text = cli("token", "create", "--user", "newcomer", "--scope", "read", **home).out.strip()
    number = text.split("_")[1]
    with Client(served.url, text) as client:
        assert list(client.list(owner="newcomer")) == []
        revoked = cli("token", "revoke", number, **home)
        assert (revoked.code, revoked.out) == (0, "")
        assert f"revoked token {number} of newcomer" in revoked.err
        with pytest.raises(InputError, match="does not know, or that is no longer valid"):
            list(client.list(owner="newcomer"))
    assert "had been revoked before" in cli("token", "revoke", number, **home).err
    states = {row["id"]: row["state"] for row in json.loads(cli("token", "list", "--json", **home).out)}
    assert states[number] == "revoked"
    with Ledger.in_directory(served.home) as ledger:
        done = [(one.action, one.detail) for one in Store(ledger).audit(limit=2)]
    assert done == [("token revoke", f"{number} of newcomer"), ("token create", f"{number} for newcomer, scope read")]


def test_a_token_that_has_expired_opens_nothing(cli: Here, served: Served):
    home = {"LORA_SWEEPS_HOME": str(served.home)}
    text = cli("token", "create", "--user", "carol", "--expires", "1e-9", **home).out.strip()
    with Client(served.url, text) as client, pytest.raises(InputError, match="no longer valid"):
        client.ready()
    rows = {row["id"]: row for row in json.loads(cli("token", "list", "--json", **home).out)}
    assert rows[text.split("_")[1]]["state"] == "expired"


def test_a_token_is_saved_in_place_of_being_printed(cli: Here):
    made = cli("token", "create", "--user", "alice", "--save", "https://Sweeps.Example/")
    assert (made.code, made.out) == (0, "")
    path = credentials.own_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (saved,) = credentials.read(path).items()
    assert saved[0] == "https://sweeps.example:443"
    assert split(saved[1]) is not None
    assert saved[1] not in made.err
    assert cli("token", "create", "--user", "bob", "--save").code == 0
    assert set(credentials.read(path)) == {"https://sweeps.example:443", "http://127.0.0.1:8321"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create",), "--user"),
        (("create", "--user", ""), "--user must be 1 to 64 letters"),
        (("create", "--user", "a b"), "--user must be 1 to 64 letters"),
        (("create", "--user", "../x"), "--user must be 1 to 64 letters"),
        (("create", "--user", "a" * 65), "--user must be 1 to 64 letters"),
        (("create", "--user", "a", "--scope", "root"), "--scope"),
        (("create", "--user", "a", "--note", "two\nlines"), "--note must be one line"),
        (("create", "--user", "a", "--note", "n" * 201), "--note must be one line"),
        (("create", "--user", "a", "--expires", "0"), "--expires"),
        (("create", "--user", "a", "--expires", "nan"), "--expires"),
        (("create", "--user", "a", "--save", "nonsense"), "a server must be http://HOST:PORT"),
        (("revoke", "lsw_000000000000_secret"), "12 hexadecimal digits"),
        (("revoke", "0123456789ab"), "has no tokens"),
    ],
    ids=lambda value: " ".join(value)[:40].replace("\n", " ") if isinstance(value, tuple) else None,
)
def test_a_wrong_request_is_refused_and_makes_no_token(cli: Here, arguments: tuple[str, ...], words: str):
    done = cli("token", *arguments)
    assert done.code == 2
    assert words in done.err
    assert done.out == ""
    assert "secret" not in done.err
    assert json.loads(cli("token", "list", "--json").out) == []


def test_an_unknown_token_is_not_revoked(cli: Here):
    cli("token", "create", "--user", "alice")
    done = cli("token", "revoke", "0123456789ab")
    assert done.code == 2
    assert "a token must be one of this service's; found 0123456789ab" in done.err
