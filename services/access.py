"""Who asks, and what they may: one guard for every route but /healthz."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import Depends, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from services import auth
from services.auth import Principal, Scope
from services.service import Service
from services.store import Store, TokenRow
from services.streaming import Hub

COOKIE = "lora_sweeps_token"
"""Where a browser keeps the token that its user has typed in."""

LOGIN = "/login"
"""Where it is typed in, as the field `token` of a form."""

OPEN = "/healthz"
"""The one route that takes no token, and no known name."""


async def guard(request: Request) -> None:
    """Lets nobody in without a valid token: every route has this, whatever else it has, but /healthz."""
    if request.scope["path"] == OPEN:  # and not of its URL, which is made with the Host header
        return
    shown = await _shown_token(request)
    service: Service = request.app.state.service
    who = None if shown is None else await run_in_threadpool(principal_of, service.store, shown)
    if who is None:
        request.app.state.metrics.refused.inc()
        raise HTTPException(
            HTTPStatus.UNAUTHORIZED,
            "a token is required: `Authorization: Bearer lsw_...`; `lora-sweeps token create` makes one",
            {"WWW-Authenticate": 'Bearer realm="lora-sweeps"'},
        )
    request.state.who, request.state.shown = who, shown


def principal_of(store: Store, text: str) -> Principal | None:
    """Who holds a token; None where it opens nothing."""
    row = row_of(store, text)
    return None if row is None else Principal(row.user, row.scope, row.id)


def row_of(store: Store, text: str) -> TokenRow | None:
    """The row of a token that is valid now."""
    if (parts := auth.split(text)) is None:
        return None
    row = store.token(parts[0])
    # A hash is compared for an unknown id too: an answer takes as long for it.
    right = auth.matches(parts[1], row.sha256 if row else "0" * 64)
    return row if row is not None and right and row.valid(time.time()) else None


async def _shown_token(request: Request) -> str | None:
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return text.strip()
    site = request.headers.get("sec-fetch-site")
    if request.scope["path"] == LOGIN and request.method == "POST":
        # Nor may another's page log somebody in, as somebody else, without their knowing.
        return form_of(await request.body()).get("token") if site in (None, "none", "same-origin") else None
    # A browser sends its cookie to whoever's page asks it to: what changes something must come from a page of ours.
    if request.method not in ("GET", "HEAD") and site != "same-origin":
        return None
    return request.cookies.get(COOKIE)


def needs(scope: Scope) -> Callable[[Request], Principal]:
    """A dependency: whoever asks, if their scope reaches so far."""

    def who(request: Request) -> Principal:
        principal: Principal = request.state.who
        if not principal.may(scope):
            raise HTTPException(
                HTTPStatus.FORBIDDEN, f"scope {scope} is required; this token has scope {principal.scope}"
            )
        return principal

    return who


Reader = Annotated[Principal, Depends(needs("read"))]
Submitter = Annotated[Principal, Depends(needs("submit"))]
Admin = Annotated[Principal, Depends(needs("admin"))]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service)]


def form_of(body: bytes) -> dict[str, str]:
    """The fields of a form that a browser sent, without blanks around them; empty ones, and what is no form, left out.

    A field that comes twice counts as it came first.
    """
    try:
        fields = parse_qs(body.decode(errors="replace"), max_num_fields=4)
    except ValueError:
        return {}
    return {name: text for name, values in fields.items() if (text := values[0].strip())}


def _hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


Events = Annotated[Hub, Depends(_hub)]


def address_of(request: Request) -> str:
    """Where a request came from."""
    return request.client.host if request.client else ""
