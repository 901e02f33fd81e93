"""What every request and answer passes, from outside in.

SafeHeaders   adds headers that keep browsers from guessing, to every answer
KnownHosts    refuses names that are not the service's
OwnFaults     puts what nobody foresaw into words
BodyLimit     refuses large bodies
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.access import OPEN
from services.problems import fault_of_ours, problem

MOST_BODY_BYTES = 2**20

_TOO_LARGE = f"a body must have at most {MOST_BODY_BYTES:,} bytes; send less"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}


class KnownHosts:
    """Answers 400 to requests that call the service by a name that is none of its own: DNS rebinding ends here."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on whose Host header is known."""
        # Whoever asks whether the process is alive, as Kubernetes does, calls it by whatever address it has just now.
        if scope["type"] != "http" or scope["path"] == OPEN or await self._knows(scope, receive):
            await self._app(scope, receive, send)
            return
        answer = problem(
            HTTPStatus.BAD_REQUEST,
            "the Host header must be a name that the service goes by; this one is not: use its own address, or have "
            "its administrator add the name to LORA_SWEEPS_ALLOWED_HOSTS",
        )
        await answer(scope, receive, send)

    async def _knows(self, scope: Scope, receive: Receive) -> bool:
        passed = False

        async def inside(*_: object) -> None:
            nonlocal passed
            passed = True

        async def unsaid(_message: Message) -> None:
            """Starlette would say it in plain text."""

        await TrustedHostMiddleware(inside, self._hosts, www_redirect=False)(scope, receive, unsaid)
        return passed


class OwnFaults:
    """Answers 500 to what nobody foresaw: with a number for whoever asked, and the rest in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and its answer back."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            pass  # nobody is left to be answered
        except Exception as error:
            if scope["type"] != "http":
                raise
            answer = fault_of_ours(scope, error)
            if begun:
                raise BrokenAnswerError from None  # the connection is cut, so that nobody takes it for the whole
            await answer(scope, receive, send)


class BrokenAnswerError(Exception):
    """An answer broke off in the middle; the log says above why."""


class BodyLimit:
    """Answers 413 to bodies of more than 1 MiB.

    One that is announced is refused on every route, and nothing of it is read; one that is not, when it gets there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on while its body stays small."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        # More digits than that are no number of bytes, and take Python long to read.
        if not announced.isdecimal() or len(announced) > 20 or int(announced) > MOST_BODY_BYTES:
            await problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LARGE)(scope, receive, send)
            return
        received, begun = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received <= MOST_BODY_BYTES:
                return message
            if begun:
                return {"type": "http.disconnect"}
            # Of a kind that whatever reads bodies lets through.
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LARGE)

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        await self._app(scope, counted, noted)


class SafeHeaders:
    """Adds headers to every answer that has none of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and its answer back."""

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, safely if scope["type"] == "http" else send)
