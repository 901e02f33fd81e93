"""The HTTP application: its routes, its guard, and what surrounds them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi

from lora_core import __version__
from services import pages, problems, routes
from services.access import guard
from services.edge import BodyLimit, KnownHosts, OwnFaults, SafeHeaders
from services.metrics import Measured, Metrics
from services.service import Service
from services.streaming import Hub

_THREADS = 8
"""That ask the database for whoever asks us."""


def make_app(service: Service, hub: Hub, background: Callable[[], Awaitable[None]] | None = None) -> FastAPI:
    """Makes the application.

    Args:
        service: what it serves.
        hub: where events come from.
        background: what runs for as long as the application does.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # Every thread is one that waits for the interpreter: more of them only make all of them slower.
        current_default_thread_limiter().total_tokens = _THREADS
        tasks = [asyncio.ensure_future(work()) for work in (hub.run, background) if work is not None]
        yield
        hub.close()
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(
        title="lora-sweeps",
        version=__version__,
        summary="LoRA hyperparameter sweeps that know alpha is a gauge",
        dependencies=[Depends(guard)],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # behind a proxy it would lead from https to http, token and all
        lifespan=lifespan,
    )
    app.state.service, app.state.hub, app.state.metrics = service, hub, Metrics(service, hub)
    app.state.guard = guard
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # as FastAPI documents it
    problems.install(app)
    app.include_router(routes.root)
    app.include_router(routes.v1)
    app.include_router(pages.router)
    app.add_middleware(BodyLimit)
    app.add_middleware(OwnFaults)
    app.add_middleware(Measured, metrics=app.state.metrics)
    app.add_middleware(KnownHosts, hosts=service.settings.hosts)
    app.add_middleware(SafeHeaders)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        components = made["components"]
        components["schemas"] |= problems.SCHEMAS
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"token": []}]
        made["paths"]["/healthz"]["get"]["security"] = []
        app.openapi_schema = made
    return app.openapi_schema
