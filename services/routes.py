"""The routes: what comes over HTTP, handed on to the service, and its answers' models."""

from __future__ import annotations

import asyncio
import secrets
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.background import BackgroundTask

from services.access import Admin, Events, Reader, Served, Submitter, address_of, row_of
from services.exports import packed
from services.problems import answers
from services.schemas import (
    Accepted,
    AuditLine,
    AuditPage,
    Export,
    Extension,
    Health,
    LogPart,
    SweepPage,
    SweepStatus,
    Translate,
)
from services.service import Order
from services.translating import as_object, translation_of
from services.views import utc
from sweeps.best import Best
from sweeps.errors import InputError
from sweeps.events import QueueState
from sweeps.plan import Plan
from sweeps.secrecy import hide_passwords
from sweeps.spec import json_schema

_SWEEP = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_USER = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
_PLACE = r"^[0-9]{1,12}(\.[0-9]{1,12})?:[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
_RULE = r"^[\x20-\x7e]{1,64}$"
_KEY = r"^[\x21-\x7e]{1,255}$"
_MOST_LOG_BYTES = 256 * 1024
_MEDIA = ("application/yaml", "application/json", "application/x-yaml", "text/yaml", "text/plain")

SweepRef = Annotated[str, Path(pattern=_SWEEP, description="A sweep's id, its name, or `last`.")]
Form = Literal["peft", "trl", "axolotl", "llamafactory", "unsloth", "hf_trainer", "loralib"]
Source = Annotated[str, Query(pattern=_FILE, description="The spec's file name, for messages.")]

_SPEC = {
    "requestBody": {
        "required": True,
        "description": "A spec, in YAML or JSON; /v1/schema says what may stand in it.",
        "content": {"application/yaml": {"schema": {"type": "string"}}, "application/json": {"schema": {}}},
    }
}
_READ = answers(401, 403, 404, 422, 503)
_CHANGE = answers(401, 403, 404, 409, 413, 422, 429, 503)
_POST = answers(401, 403, 413, 415, 422, 429, 503)


async def _text(request: Request) -> str:
    """The spec in a request's body.

    Raises:
        HTTPException: it is no YAML or JSON, or no UTF-8.
    """
    media = request.headers.get("content-type", "application/yaml").partition(";")[0].strip().lower()
    if media not in _MEDIA:
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a spec must be sent as {' or '.join(_MEDIA[:2])}; found {media}"
        )
    try:
        return (await request.body()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"a spec must be UTF-8 text; byte {error.start} is none") from None


# -- outside of /v1 ----------------------------------------------------------------------------------------------------

root = APIRouter(tags=["service"])


@root.get("/healthz", operation_id="healthz")
async def healthz() -> Health:
    """Whether the process is alive; for everybody."""
    return Health(status="ok")


@root.get("/readyz", operation_id="readyz", responses=answers(401) | {503: {"model": Health}})
def readyz(service: Served, _who: Reader) -> Response:
    """Whether the database answers and the queue is looked after."""
    reason = hide_passwords(service.unready())
    health = Health(status="not ready" if reason else "ok", reason=reason)
    return JSONResponse(health.model_dump(), HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK)


@root.get("/metrics", operation_id="metrics", responses=answers(401, 503), response_class=Response)
def metrics(request: Request, _who: Reader) -> Response:
    """Metrics for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


@root.get("/openapi.json", operation_id="openapi", include_in_schema=False)
def openapi(request: Request, _who: Reader) -> JSONResponse:
    """This document."""
    return JSONResponse(request.app.openapi())


# -- sweeps ------------------------------------------------------------------------------------------------------------

v1 = APIRouter(prefix="/v1", tags=["sweeps"])


@v1.post(
    "/sweeps", operation_id="submit", status_code=201, responses=_POST | {200: {"model": Accepted}}, openapi_extra=_SPEC
)
async def submit(
    request: Request,
    response: Response,
    who: Submitter,
    service: Served,
    name: Annotated[str | None, Query(pattern=_NAME, description="In place of the spec's own name.")] = None,
    priority: Annotated[int, Query(ge=-100, le=100, description="Above 0: before everybody's; scope admin.")] = 0,
    shared: Annotated[bool, Query(description="Whether every user may see the sweep.")] = False,
    source: Source = "spec",
    idempotency_key: Annotated[str | None, Header(pattern=_KEY, description="Sent again, it changes nothing.")] = None,
) -> Accepted:
    """Submit a sweep: it is validated and planned first, and queued if it can run. 200: it had been submitted."""
    text = await _text(request)
    order = Order(text, source, name, priority, shared, idempotency_key, address_of(request))
    accepted, new = await service.submit(who, order)
    response.status_code = HTTPStatus.CREATED if new else HTTPStatus.OK
    response.headers["Location"] = f"/v1/sweeps/{accepted.sweep}"
    return accepted


@v1.get("/sweeps", operation_id="list", responses=answers(401, 403, 422, 503))
def list_sweeps(
    who: Reader,
    service: Served,
    state: Annotated[list[QueueState], Query(description="Only these.")] = [],  # noqa: B006  # read only
    owner: Annotated[str | None, Query(pattern=_USER, description="Only this user's.")] = None,
    name: Annotated[str | None, Query(pattern=_NAME, description="Only those of this name.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[str | None, Query(pattern=_PLACE, description="`next` of the page before.")] = None,
) -> SweepPage:
    """Sweeps that you may see, latest first."""
    return service.page(who, after, limit, states=state, owner=owner, name=name)


@v1.get("/sweeps/{sweep}", operation_id="status", responses=_READ)
def status(sweep: SweepRef, who: Reader, service: Served) -> SweepStatus:
    """A sweep: its state, progress, best point, plan, and where it is in MLflow."""
    return service.status(service.find(who, sweep))


@v1.get(
    "/sweeps/{sweep}/events",
    operation_id="events",
    response_class=StreamingResponse,
    responses=_READ | {200: {"content": {"text/event-stream": {}}}},
)
async def events(
    request: Request,
    sweep: SweepRef,
    who: Reader,
    service: Served,
    hub: Events,
    after: Annotated[int, Query(ge=0, le=2**62, description="Only events after this number.")] = 0,
    last_event_id: Annotated[str | None, Header(description="What a client that reconnects sends.")] = None,
) -> StreamingResponse:
    """A sweep's events as server-sent events: first those that were, then those to come; `end` is the last."""
    row = await asyncio.to_thread(service.find, who, sweep)
    if last_event_id is not None and last_event_id.isascii() and last_event_id.isdecimal():
        after = max(after, int(last_event_id[:18]))
    shown = request.state.shown
    stream = hub.listen(
        row.sweep, after=after, state=row.state, allowed=lambda: row_of(service.store, shown) is not None
    )
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@v1.get("/sweeps/{sweep}/logs", operation_id="logs", responses=_READ)
def logs(
    sweep: SweepRef,
    who: Reader,
    service: Served,
    offset: Annotated[int | None, Query(ge=0, le=2**62, description="Byte to begin at; without it, the end.")] = None,
) -> LogPart:
    """What the sweep's drivers wrote: its end, or from an offset on; at most 256 KiB."""
    text, start, end = service.logs(service.find(who, sweep), offset=offset, most_bytes=_MOST_LOG_BYTES)
    return LogPart(text=text, offset=start, next=end)


@v1.post("/sweeps/{sweep}/cancel", operation_id="cancel", status_code=202, responses=_CHANGE)
def cancel(request: Request, sweep: SweepRef, who: Submitter, service: Served) -> SweepStatus:
    """Cancel a sweep: it ends in order, and may be resumed."""
    return service.status(service.cancel(who, service.own(who, sweep), address_of(request)))


@v1.post("/sweeps/{sweep}/resume", operation_id="resume", status_code=202, responses=_CHANGE)
def resume(request: Request, sweep: SweepRef, who: Submitter, service: Served) -> SweepStatus:
    """Queue a sweep again that was paused, failed or cancelled; it goes on where it left off."""
    return service.status(service.resume(who, service.own(who, sweep), address_of(request)))


@v1.post("/sweeps/{sweep}/extend", operation_id="extend", status_code=202, responses=_CHANGE | answers(400))
def extend(request: Request, sweep: SweepRef, extension: Extension, who: Submitter, service: Served) -> SweepStatus:
    """Give a sweep more trials, and queue it again."""
    return service.status(service.extend(who, service.own(who, sweep), extension.trials, address_of(request)))


# -- results -----------------------------------------------------------------------------------------------------------

_MEDIA_OF = {"json": "application/json", "md": "text/markdown; charset=utf-8", "html": "text/html; charset=utf-8"}
_ALONE = "sandbox allow-popups; default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@v1.get(
    "/sweeps/{sweep}/report",
    operation_id="report",
    response_class=Response,
    responses=_READ | {200: {"content": {media.partition(";")[0]: {} for media in _MEDIA_OF.values()}}},
)
async def report(
    sweep: SweepRef, who: Reader, service: Served, format: Literal["json", "md", "html"] = "json"
) -> Response:
    """The collapse report."""
    row = await asyncio.to_thread(service.find, who, sweep)
    text = await service.report(who, row, format)
    headers = {"Content-Security-Policy": _ALONE} if format == "html" else {}
    return Response(text, media_type=_MEDIA_OF[format], headers=headers)


@v1.get("/sweeps/{sweep}/best", operation_id="best", responses=_READ)
def best(sweep: SweepRef, who: Reader, service: Served) -> Best:
    """The best point, with every number that a trainer asks for."""
    return service.best(service.find(who, sweep))


@v1.get(
    "/sweeps/{sweep}/export",
    operation_id="export",
    responses=_READ | {200: {"model": Export, "content": {"application/zip": {}}}},
    response_model=Export,
)
def export(
    request: Request,
    sweep: SweepRef,
    who: Reader,
    service: Served,
    format: Annotated[Form, Query(description="The trainer.")],
    alpha: Annotated[
        str | None,
        Query(pattern=_RULE, description="A number or a rule; else that of its default init."),
    ] = None,
    trial: Annotated[int | None, Query(ge=0, le=2**31, description="This trial and not the best one.")] = None,
) -> Any:
    """The best point in a trainer's config format: JSON with the files' texts, or (Accept: application/zip) packed."""
    exported = service.export(service.find(who, sweep), format, alpha, trial)
    if "application/zip" in request.headers.get("accept", ""):
        name = f"{exported.sweep}-{format}.zip"
        return Response(packed(exported.files), media_type="application/zip", headers=_attached(name))
    return exported


@v1.get(
    "/sweeps/{sweep}/adapter",
    operation_id="adapter",
    response_class=FileResponse,
    responses=_READ | {200: {"content": {"application/zip": {}}}},
)
async def adapter(
    sweep: SweepRef,
    who: Reader,
    service: Served,
    trial: Annotated[int | None, Query(ge=0, le=2**31, description="This trial and not the best one.")] = None,
) -> FileResponse:
    """The trained adapter: a ZIP archive of a PEFT folder, weights as safetensors."""
    row = await asyncio.to_thread(service.find, who, sweep)
    archive = service.scratch() / f"{secrets.token_hex(16)}.zip"
    gone = BackgroundTask(archive.unlink, missing_ok=True)
    try:
        await service.adapter(who, row, trial, archive)
    except BaseException:
        archive.unlink(missing_ok=True)
        raise
    return FileResponse(
        archive, media_type="application/zip", headers=_attached(f"{row.sweep}-adapter.zip"), background=gone
    )


def _attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


# -- the rest ----------------------------------------------------------------------------------------------------------


@v1.post("/plan", operation_id="plan", responses=_POST, openapi_extra=_SPEC, tags=["specs"])
async def plan(
    request: Request,
    who: Submitter,
    service: Served,
    source: Source = "spec",
    timed: Annotated[bool, Query(description="Run a few steps to estimate the time.")] = False,
) -> Plan:
    """What a spec would run here."""
    return await service.plan(who, await _text(request), source, timed=timed)


@v1.post("/translate", operation_id="translate", responses=answers(400, 401, 403, 413, 422, 503), tags=["specs"])
def translate(asked: Translate, _who: Reader) -> dict[str, Any]:
    """A training run with another alpha, lr or init scale: the same run."""
    return as_object(translation_of(asked))


@v1.get("/schema", operation_id="schema", responses=answers(401, 403), tags=["specs"])
def schema(_who: Reader) -> dict[str, Any]:
    """The JSON schema of a spec."""
    return json_schema()


@v1.get("/audit", operation_id="audit", responses=answers(401, 403, 422, 503), tags=["service"])
def audit(
    _who: Admin,
    service: Served,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, le=2**62, description="`next` of the page before.")] = None,
) -> AuditPage:
    """Who did what, latest first."""
    found = service.store.audit(before=before, limit=limit + 1)
    lines = tuple(
        AuditLine(
            seq=one.seq,
            at=utc(one.at_s),
            user=one.user,
            token=one.token,
            address=one.address,
            action=one.action,
            sweep=one.sweep,
            detail=one.detail,
        )
        for one in found[:limit]
    )
    return AuditPage(entries=lines, next=lines[-1].seq if len(found) > limit else None)
