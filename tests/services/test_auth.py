"""Tokens: how they are made, and how one is told from another."""

from __future__ import annotations

import base64

import pytest

from services import auth
from services.auth import SCOPES, Principal, Scope


def test_a_token_has_256_bits_and_is_stored_as_a_hash_only():
    made = auth.make_token()
    parts = auth.split(made.text)
    assert parts is not None
    token, secret = parts
    assert token == made.id
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    assert secret not in made.sha256
    assert auth.matches(secret, made.sha256)
    assert not auth.matches(secret[:-1] + ("A" if secret[-1] != "A" else "B"), made.sha256)


def test_no_two_tokens_are_alike():
    assert len({auth.make_token().text for _ in range(200)}) == 200


@pytest.mark.parametrize(
    "text",
    ["", "lsw_", "lsw_0123456789ab_", "x" * 1000, "lsw_0123456789AB_" + "a" * 43, "lsw_0123456789ab_" + "é" * 43],
)
def test_what_is_no_token_is_none(text: str):
    assert auth.split(text) is None


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_reaches_as_far_as_those_before_it(scope: Scope):
    principal = Principal("ann", scope, "t")
    assert [one for one in SCOPES if principal.may(one)] == list(SCOPES[: SCOPES.index(scope) + 1])


@pytest.mark.parametrize("name", ["ann", "Ann.B-c_d", "ann@example.org", "a" * 64, "0"])
def test_names_of_users(name: str):
    assert auth.is_user_name(name)


@pytest.mark.parametrize("name", ["", "-ann", "a" * 65, "ann bob", "ann\n", "../x", "a/b", "é"])
def test_what_is_no_name_of_a_user(name: str):
    assert not auth.is_user_name(name)
