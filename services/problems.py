"""What goes wrong, as problem details (RFC 9457): a status, words, and the faults of a spec with their lines."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from services.planning import BusyError
from services.schemas import FaultModel, Problem
from services.store import KeyTakenError
from sweeps.errors import InputError, SpecError, StateError, SweepNotFoundError
from sweeps.secrecy import hide_passwords

_LOG = logging.getLogger("lora_sweeps")

MEDIA_TYPE = "application/problem+json"


class RefusedError(InputError):
    """What was asked for cannot be done now, or not by this user.

    Attributes:
        status: the HTTP status that says so.
    """

    def __init__(self, message: str, status: int = HTTPStatus.CONFLICT) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: these statuses come with a problem."""
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": _SCHEMA}}}
        for status in statuses
    }


_SCHEMA = {"$ref": "#/components/schemas/Problem"}

_OF_PROBLEM = Problem.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
SCHEMAS: dict[str, Any] = {**_OF_PROBLEM.pop("$defs"), "Problem": _OF_PROBLEM}
"""Of a problem, for the OpenAPI document."""


def problem(
    status: int, detail: str, faults: tuple[FaultModel, ...] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer that says what went wrong."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=hide_passwords(detail), faults=faults)
    return JSONResponse(body.model_dump(), status, dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Has an application answer every error with a problem."""
    app.add_exception_handler(InputError, _of_input)
    app.add_exception_handler(RequestValidationError, _of_request)
    app.add_exception_handler(HTTPException, _of_http)


def away(error: Exception) -> str:
    """What is said where the ledger cannot be used: where it is, and as whom it is asked, only the log tells."""
    message, now_s = hide_passwords(str(error)), time.monotonic()
    if now_s - _LOGGED.get(message, -math.inf) >= _LOG_AGAIN_S:
        if len(_LOGGED) >= _MOST_LOGGED:
            _LOGGED.clear()
        _LOGGED[message] = now_s
        _LOG.error("requests are refused: %s", message)
    return "the ledger is away for now; try again in a while"


_LOGGED: dict[str, float] = {}
"""When each of these messages was logged last: a database that is away is logged once, and not for every request."""

_LOG_AGAIN_S, _MOST_LOGGED = 60.0, 16


async def _refusal(request: Request) -> JSONResponse | None:
    """What a stranger is told in place of a fault of their request: FastAPI reads bodies before it asks anybody.

    None where the guard has let them in.
    """
    if hasattr(request.state, "who"):
        return None
    try:
        await request.app.state.guard(request)
    except HTTPException as refused:
        return problem(refused.status_code, str(refused.detail), headers=refused.headers)
    except InputError as error:
        return await _of_input(request, error)
    return None


async def _of_input(_request: Request, error: Exception) -> JSONResponse:
    match error:
        case SpecError():
            faults = tuple(
                FaultModel(path=f.path, line=f.line, required=f.required, found=hide_passwords(f.found), hint=f.hint)
                for f in error.faults
            )
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), faults)
        case RefusedError():
            return problem(error.status, str(error))
        case SweepNotFoundError():
            return problem(HTTPStatus.NOT_FOUND, str(error))
        case BusyError():
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error), headers={"Retry-After": "10"})
        case StateError():
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, away(error), headers={"Retry-After": "5"})
        case KeyTakenError():
            return problem(HTTPStatus.CONFLICT, str(error))
        case _:
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))


async def _of_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if (refusal := await _refusal(request)) is not None:
        return refusal
    found = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(found))


async def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # FastAPI's word on a body that is no text; the guard's own refusal has another status.
    if error.status_code == HTTPStatus.BAD_REQUEST and (refusal := await _refusal(request)) is not None:
        return refusal
    detail = str(error.detail)
    if detail in _OF_FASTAPI:
        detail = _OF_FASTAPI[detail].format(method=request.method)
    return problem(error.status_code, detail, headers=error.headers)


_OF_FASTAPI = {
    "Not Found": "a request must be for one of the service's routes, which /openapi.json lists; this is none",
    "Method Not Allowed": "a route must be asked with a method that it has, as /openapi.json lists them; this one has "
    "no {method}",
    "There was an error parsing the body": "a body must be JSON in UTF-8; found something else",
}
"""What FastAPI says by itself, in better words."""


def fault_of_ours(scope: Scope, error: Exception) -> JSONResponse:
    """A fault of ours: whoever asked learns its number, and the log has the rest."""
    number = secrets.token_hex(4)
    _LOG.error("fault %s: %s %s", number, scope["method"], scope["path"], exc_info=error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, f"a fault of the service's own; its log has more at {number}")
