"""What tests of the client share: a sweep that has finished at a service, and small servers that are none of ours."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2 as httpx

from services.client import Client
from tests.services.service_support import Served


def finished_sweep(served: Served) -> str:
    """A small sweep that has finished there: the one that was, else a new one."""
    with Client(served.url, served.token) as client:
        known = [one.sweep for one in client.list(state=["finished"], name="tiny")]
    if known:
        return known[-1]
    sweep = served.submit()
    assert served.wait_for(sweep, "finished", "failed", "paused")["state"] == "finished"
    return sweep


def settle(served: Served) -> None:
    """Waits until every sweep there has come to its end, so that nothing changes between two looks."""
    with Client(served.url, served.token) as client:
        for one in list(client.list()):
            for _ in client.events(one.sweep):
                pass


@dataclass
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What is answered to it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Stub:
    """A server that remembers what it was asked."""

    url: str
    asked: list[Asked] = field(default_factory=list)


@contextlib.contextmanager
def stub(answer: Callable[[Asked, int], Answer | None], certificate: tuple[Path, Path] | None = None) -> Iterator[Stub]:
    """A server for as long as the context lasts.

    Args:
        answer: what is answered to a request and its number, counted from 1; None drops the connection.
        certificate: PEM files with a certificate and its key, for https.
    """

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ssl.SSLError, ConnectionError):  # a client that does not trust us hangs up
                super().handle()

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.command, self.path, headers, self.rfile.read(size))
            here.asked.append(asked)
            given = answer(asked, len(here.asked))
            self.close_connection = True
            if given is None:
                return
            self.send_response(given.status)
            for name, value in ({"Content-Length": str(len(given.body))} | given.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(given.body)

        do_GET = do_POST = handle_any  # noqa: N815  # http.server looks for these

        def log_message(self, *_about: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Stub(f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}")
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        # The handshake is the handler's thread's: one that fails must not end the server.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def passed_on(asked: Asked, served: Served) -> Answer:
    """What a service answers to a request that came to another server."""
    kept = {name: value for name, value in asked.headers.items() if name not in ("host", "content-length")}
    answer = httpx.request(
        asked.method, served.url + asked.path, headers=kept, content=asked.body, timeout=120, trust_env=False
    )
    return Answer(answer.status_code, answer.content, {"Content-Type": answer.headers.get("content-type", "")})
