"""HTTP to a service: asks again where that does no harm, goes nowhere else, and turns problems into our exceptions."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import IO, Any
from urllib.parse import urlsplit

import httpx2 as httpx
from pydantic import ValidationError

from lora_core import __version__
from services.credentials import origin
from services.schemas import Problem
from sweeps.errors import Fault, InputError, SpecError, StateError, SweepNotFoundError

_WAITS_S = (0.25, 0.5, 1.0, 2.0)
"""Between one attempt and the next; a server that asks for longer is given it."""
_MOST_WAIT_S = 30.0
_PATIENCE_S = 300.0
"""How long a service may be away while somebody watches a sweep."""
_SILENCE_S = 60.0
"""A stream that says nothing for so long is broken: the service says something every 15 s."""
_AWAY = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
_MOST_EVENT_BYTES = 256 * 2**20
_CHUNK_BYTES = 2**20


class Connection:
    """A connection to one service. Certificates are verified, redirects are not followed."""

    def __init__(self, server: str, token: str | None, *, timeout_s: float) -> None:
        """Connects to nothing yet.

        Args:
            server: its address.
            token: to be shown with every request; None for none.
            timeout_s: how long an answer may take.

        Raises:
            InputError: this is no address of a server.
        """
        self.server = server.rstrip("/")
        self.origin = origin(server)
        self.encrypted = self.origin.startswith("https:")
        self.on_loopback = _is_loopback(urlsplit(self.origin).hostname or "")
        self._has_token = token is not None
        headers = {"User-Agent": f"lora-sweeps/{__version__}"}
        self._http = httpx.Client(
            base_url=self.server,
            headers=headers if token is None else headers | {"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            follow_redirects=False,
            # No proxy is needed to reach this machine, whatever the environment says.
            mounts=dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]")),
        )

    def close(self) -> None:
        """Closes it."""
        self._http.close()

    def ask(
        self, method: str, path: str, *, again: bool = True, source: str = "spec", least_s: float = 0.0, **request: Any
    ) -> httpx.Response:
        """Asks, and returns an answer that says that all went well.

        Args:
            method: of HTTP.
            path: below the server's address.
            again: whether it may be asked again where it is not known what became of it.
            source: what the user calls the spec that is sent.
            least_s: the answer may take so long at least.
            request: what else httpx takes: params, content, headers, json.

        Raises:
            InputError: what the server said, or that it does not answer.
        """
        timeout = self._http.timeout
        if least_s > (timeout.read or 0):
            request["timeout"] = httpx.Timeout(least_s, connect=timeout.connect)
        for wait_s in (*_WAITS_S, None):
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                if wait_s is None or not (again or _was_not_sent(error)) or _is_final(error):
                    raise self._unreachable(error) from None
            else:
                if wait_s is None or not again or response.status_code not in _AWAY:
                    return self._checked(response, source)
                wait_s = max(wait_s, _asked_to_wait_s(response))
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def download(self, path: str, file: IO[bytes], *, most_bytes: int, least_s: float, **request: Any) -> None:
        """Puts an answer into a file.

        Raises:
            InputError: what the server said, that it does not answer, or that it sends too much.
        """
        timeout = httpx.Timeout(least_s, connect=self._http.timeout.connect)
        for wait_s in (*_WAITS_S, None):
            file.seek(0)
            file.truncate()
            try:
                with self._http.stream("GET", path, timeout=timeout, **request) as response:
                    if wait_s is None or response.status_code not in _AWAY:
                        self._take(response, file, most_bytes)
                        return
            except httpx.TransportError as error:
                if wait_s is None or _is_final(error):
                    raise self._unreachable(error) from None
            time.sleep(wait_s or 0)

    def _take(self, response: httpx.Response, file: IO[bytes], most_bytes: int) -> None:
        if not response.is_success:
            response.read()
            self._checked(response, "spec")
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            if file.tell() + len(chunk) > most_bytes:
                raise InputError(f"{self.server} must send at most {most_bytes:,} bytes; it sends more")
            file.write(chunk)

    def listen(self, path: str, *, after: int) -> Iterator[httpx.ServerSentEvent]:
        """Server-sent events after one, whatever happens to the connection; the last one is named `end`.

        Raises:
            InputError: what the server said, or that it stayed away for too long.
        """
        waits, silent_since_s = iter(_WAITS_S), time.monotonic()
        while True:
            error: Exception | None = None
            try:
                for event in self._stream(path, after):
                    yield event
                    if event.event == "end":
                        return
                    after = int(event.id)
                    waits, silent_since_s = iter(_WAITS_S), time.monotonic()
            except httpx.TransportError as broken:
                if _is_final(broken):
                    raise self._unreachable(broken) from None
                error = self._unreachable(broken)
            except StateError as away:
                error = away
            if time.monotonic() - silent_since_s > _PATIENCE_S:
                raise error or InputError(f"{self.server} must send events; it ends the stream again and again")
            time.sleep(next(waits, _WAITS_S[-1]))

    def _stream(self, path: str, after: int) -> Iterator[httpx.ServerSentEvent]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        timeout = httpx.Timeout(_SILENCE_S, connect=self._http.timeout.connect)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                self._checked(response, "spec")
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise self.stranger(response)
            yield from httpx.EventSource(response, max_event_size=_MOST_EVENT_BYTES)

    # -- what went wrong

    def _checked(self, response: httpx.Response, source: str) -> httpx.Response:
        if response.is_success:
            return response
        status, problem = response.status_code, _problem_of(response)
        if response.is_redirect:
            raise InputError(
                f"a service must answer where it is asked; {self.server} points to "
                f"{response.headers.get('location', 'elsewhere')[:200]!r}, where no token is sent unasked: if that is "
                "right, give it as --server"
            )
        if status in _AWAY:
            said = problem.detail if problem else HTTPStatus(status).phrase
            raise StateError(f"{self.server} must be ready; it is not for now: {said}; try again in a while")
        if problem is None:
            raise self.stranger(response)
        if status == HTTPStatus.UNAUTHORIZED:
            raise self._unknown()
        if status == HTTPStatus.FORBIDDEN:
            raise InputError(f"{problem.detail}; whoever runs {self.server} makes tokens that may do more")
        if status == HTTPStatus.NOT_FOUND:
            raise SweepNotFoundError(problem.detail)
        if problem.faults:
            faults = (Fault(one.path, one.required, one.found, one.line, one.hint) for one in problem.faults)
            raise SpecError(source, tuple(faults))
        raise InputError(problem.detail)

    def _unknown(self) -> InputError:
        found = "found one that it does not know, or that is no longer valid" if self._has_token else "found none"
        return InputError(
            f"{self.server} must be shown a token; {found}: `lora-sweeps login --server {self.server}` keeps yours in "
            "a file, LORA_SWEEPS_TOKEN names one for now, and whoever runs the service makes one with `lora-sweeps "
            "token create`"
        )

    def stranger(self, response: httpx.Response) -> InputError:
        """For an answer that no service of ours gives."""
        hint = "correct the address, or the proxy before it"
        if response.status_code == HTTPStatus.BAD_REQUEST and "host" in response.text.lower():
            hint = "it goes by another name, or must be told this one: LORA_SWEEPS_ALLOWED_HOSTS"
        return InputError(
            f"{self.server} must be a service of lora-sweeps that this version knows; it answered HTTP "
            f"{response.status_code}, and not as one does: {hint}"
        )

    def _unreachable(self, error: Exception) -> InputError:
        cause = str(error) or type(error).__name__
        return InputError(
            f"{self.server} must answer; it does not: {cause}; correct the address, or have the service started "
            "(`lora-sweeps serve`)"
        )


def _problem_of(response: httpx.Response) -> Problem | None:
    if response.headers.get("content-type", "").partition(";")[0] != "application/problem+json":
        return None
    with contextlib.suppress(ValidationError):
        return Problem.model_validate_json(response.content, extra="ignore")
    return None


def _was_not_sent(error: httpx.TransportError) -> bool:
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


def _is_final(error: httpx.TransportError) -> bool:
    """Whether it will not be better in a moment: a wrong certificate, a name that nobody knows."""
    text = str(error)
    final = isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.SSEError)
    return final or any(sign in text for sign in ("CERTIFICATE", "SSL", "[Errno -2]"))


def _asked_to_wait_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return min(float(text), _MOST_WAIT_S) if text.isascii() and text.isdecimal() else 0.0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
