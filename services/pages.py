"""Pages for people: the queue, a sweep, its log, its exports. Plain HTML; a script only keeps them up to date."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Annotated, Any, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from services.access import COOKIE, LOGIN, Reader, Served, Submitter, address_of, form_of
from services.auth import Principal
from services.exports import packed
from services.page_views import in_queue_order, sweep_view
from services.routes import Form, SweepRef
from services.schemas import Problem
from services.store import OPEN, AuditEntry, Submission
from services.templating import STATIC, policy_with_styles, render, static
from sweeps.errors import InputError
from sweeps.events import Event, QueueState

_COOKIE_S = 7 * 24 * 3600
_MOST_OPEN, _MOST_ENDED = 200, 50
_MOST_LOG_BYTES = 128 * 1024
_ENDED: tuple[QueueState, ...] = ("paused", "finished", "failed", "cancelled")
_RESUMABLE = ("paused", "failed", "cancelled")
_FORMATS: tuple[str, ...] = get_args(Form)
_KINDS = (*(kind.model_fields["kind"].default for kind in get_args(Event)), "end")
"""Names that events come by."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_OURS = re.compile(r"/|/sweeps/[A-Za-z0-9][A-Za-z0-9._-]{0,79}(/log|/export)?")
"""Where somebody may be sent after they have logged in: to a page, and nowhere else."""


class _PageRoute(APIRoute):
    """A route whose problems people read: who has no token gets the form that takes one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI, and what becomes of its exceptions."""
        handle = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await handle(request)
            except (InputError, RequestValidationError, HTTPException) as error:
                if "text/html" not in request.headers.get("accept", ""):
                    raise
                return await _in_words(request, error)

        return shown


router = APIRouter(include_in_schema=False, route_class=_PageRoute)


async def _in_words(request: Request, error: Exception) -> Response:
    """The page that says what went wrong."""
    handlers = request.app.exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    answer: Response = await handler(request, error)
    problem = Problem.model_validate_json(bytes(answer.body))
    if answer.status_code == HTTPStatus.UNAUTHORIZED:
        return await _login(request, answer.headers["www-authenticate"])
    text = render("problem", who=getattr(request.state, "who", None), problem=problem)
    kept = {name: value for name, value in answer.headers.items() if name == "retry-after"}
    return HTMLResponse(text, answer.status_code, kept)


async def _login(request: Request, challenge: str) -> Response:
    fault, here = "", str(request.url.path)
    if here == LOGIN and request.method == "POST":
        form = form_of(await request.body())
        here = form.get("next", "")
        fault = (
            "That token opens nothing here: it is mistyped, has expired, or was revoked."
            if "token" in form
            else "A token is required, and none was typed in."
        )
    elif COOKIE in request.cookies:
        ours = request.method in ("GET", "HEAD") or request.headers.get("sec-fetch-site") == "same-origin"
        fault = (
            "You are logged out: your token has expired, or was revoked."
            if ours
            else "Nothing was done: what changes something must be asked for on a page of this service."
        )
    text = render(
        "login",
        fault=fault,
        here=here if _OURS.fullmatch(here) else "/",
        from_elsewhere=request.headers.get("sec-fetch-site") == "cross-site" and request.method == "GET",
    )
    headers = {"WWW-Authenticate": challenge, "Content-Security-Policy": policy_with_styles()}
    return HTMLResponse(text, HTTPStatus.UNAUTHORIZED, headers)


def _see_other(path: str) -> RedirectResponse:
    return RedirectResponse(path, HTTPStatus.SEE_OTHER)


# -- logging in and out ------------------------------------------------------------------------------------------------


@router.get(LOGIN)
def login_page(_who: Reader) -> Response:
    """Nothing to do: who gets here is logged in."""
    return _see_other("/")


@router.post(LOGIN)
async def login(request: Request, who: Reader, service: Served) -> Response:
    """Keeps the token that the guard has accepted in a cookie."""
    there = form_of(await request.body()).get("next", "/")
    entry = AuditEntry(who.user, "login", token=who.token, address=address_of(request))
    await run_in_threadpool(service.store.enter, entry)
    answer = _see_other(there if _OURS.fullmatch(there) else "/")
    answer.set_cookie(
        COOKIE,
        request.state.shown,
        max_age=_COOKIE_S,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
def logout(_who: Reader) -> Response:
    """Forgets the token in this browser; it stays valid."""
    answer = _see_other("/")
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/static/{name}")
def static_file(name: str, _who: Reader) -> Response:
    """The styles and the script."""
    if name not in STATIC:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"a file must be one of {', '.join(STATIC)}")
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(static(name), media_type=STATIC[name], headers=headers)


# -- the queue ---------------------------------------------------------------------------------------------------------


@router.get("/")
def queue(
    who: Reader,
    service: Served,
    request: Request,
    state: QueueState | None = None,
    after: Annotated[str | None, Query(max_length=200)] = None,
    fragment: bool = False,
) -> Response:
    """The queue: what runs and what waits, then what has ended, latest first."""
    wanted = [state] if state else [*OPEN, *_ENDED]
    open_states, ended_states = [one for one in wanted if one in OPEN], [one for one in wanted if one in _ENDED]
    going = ended = None
    if open_states and (after is None or state):
        going = service.page(who, after, _MOST_OPEN, states=open_states)
    if ended_states:
        ended = service.page(who, after, _MOST_ENDED, states=ended_states)
    places = service.places() if going else {}
    here = {"state": state} if state else {}
    text = render(
        "queue_live" if fragment else "queue",
        who=who,
        going=in_queue_order(going.sweeps, places) if going else None,
        more_going=_more(going.next, {"state": state or "queued"}) if going and going.next else None,
        ended=ended.sweeps if ended else None,
        more_ended=_more(ended.next, here) if ended and ended.next else None,
        state=state,
        states=[*OPEN, *_ENDED],
        after=after,
        server=str(request.base_url).rstrip("/"),
        fragment="/?" + urlencode(here | ({"after": after} if after else {}) | {"fragment": 1}),
    )
    return HTMLResponse(text)


def _more(after: str, only: Mapping[str, str]) -> str:
    return "/?" + urlencode({**only, "after": after})


# -- a sweep -----------------------------------------------------------------------------------------------------------


def _may_change(who: Principal, row: Submission) -> bool:
    return who.may("submit") and (row.owner == who.user or who.may("admin"))


@router.get("/sweeps/{sweep}")
def sweep_page(sweep: SweepRef, who: Reader, service: Served, fragment: bool = False) -> Response:
    """A sweep: where it stands, and what was found."""
    row = service.find(who, sweep)
    may = _may_change(who, row)
    asked = row.wanted == "cancel"
    text = render(
        "sweep_live" if fragment else "sweep",
        who=who,
        view=sweep_view(service, row),
        may_cancel=may and not asked and row.state in (*OPEN, "paused"),
        may_resume=may and not asked and row.state in _RESUMABLE,
        formats=_FORMATS,
        kinds=_KINDS,
    )
    return HTMLResponse(text)


@router.get("/sweeps/{sweep}/log")
def log_page(sweep: SweepRef, who: Reader, service: Served) -> Response:
    """The end of what a sweep's drivers wrote."""
    row = service.find(who, sweep)
    text, start, end = service.logs(row, offset=None, most_bytes=_MOST_LOG_BYTES)
    return HTMLResponse(render("log", who=who, sweep=row.sweep, text=_ANSI.sub("", text), start=start, end=end))


@router.get("/sweeps/{sweep}/export")
def export_page(sweep: SweepRef, who: Reader, service: Served, format: Form = "peft") -> Response:
    """The best point in a trainer's config format, to read and to copy."""
    exported = service.export(service.find(who, sweep), format, None, None)
    return HTMLResponse(render("export", who=who, exported=exported, formats=_FORMATS))


@router.get("/sweeps/{sweep}/export.zip")
def export_archive(sweep: SweepRef, who: Reader, service: Served, format: Form = "peft") -> Response:
    """The same, as an archive."""
    exported = service.export(service.find(who, sweep), format, None, None)
    headers = {"Content-Disposition": f'attachment; filename="{exported.sweep}-{format}.zip"'}
    return Response(packed(exported.files), media_type="application/zip", headers=headers)


@router.post("/sweeps/{sweep}/cancel")
def cancel(request: Request, sweep: SweepRef, who: Submitter, service: Served) -> Response:
    """Cancels a sweep, and shows it again."""
    row = service.cancel(who, service.own(who, sweep), address_of(request))
    return _see_other(f"/sweeps/{row.sweep}")


@router.post("/sweeps/{sweep}/resume")
def resume(request: Request, sweep: SweepRef, who: Submitter, service: Served) -> Response:
    """Queues a sweep again, and shows it."""
    row = service.resume(who, service.own(who, sweep), address_of(request))
    return _see_other(f"/sweeps/{row.sweep}")
