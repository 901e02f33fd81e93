"""A client of the service: the command line's verbs, typed.

    with Client("https://sweeps.example") as client:
        sweep = client.submit(Path("digits.yaml")).sweep
        for record in client.events(sweep):
            print(record.event.kind)
        print(client.best(sweep).lr)

What cannot be done is raised as on the command line: SpecError with every fault, SweepNotFoundError, InputError.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from json import loads
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from services import credentials, following
from services.connection import Connection
from services.schemas import Accepted, Export, Health, LogPart, SweepPage, SweepStatus, SweepSummary
from services.unpacking import unpack
from sweeps.best import Best
from sweeps.collapse import Certificate
from sweeps.errors import InputError, StateError, SweepNotFoundError
from sweeps.events import EVENT, Certified, Event, QueueState, Record
from sweeps.home import Home
from sweeps.plan import Plan
from sweeps.spec import read_text

ReportFormat = Literal["md", "json", "html"]

_SWEEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_YAML = {"Content-Type": "application/yaml"}
_HEAVY_S = 300.0
"""Planning, reports and adapters may take a while, and wait for others'."""
_PAGE = 200
_LOOK_EVERY_S = 1.0
_MOST_ADAPTER_BYTES = 16 * 2**30

_Model = TypeVar("_Model", bound=BaseModel)
_T = TypeVar("_T")


class PlainHttpWarning(UserWarning):
    """A token travels in clear."""


class Client:
    """Asks a service. Not safe to use from several threads at once."""

    def __init__(self, server: str | None = None, token: str | None = None, *, timeout_s: float = 30.0) -> None:
        """Connects to nothing yet.

        Args:
            server: its address; None for that in LORA_SWEEPS_SERVER.
            token: shown with every request; None for LORA_SWEEPS_TOKEN, or the one that a file has for this server.
            timeout_s: how long an answer may take; planning, reports and adapters are given more.

        Raises:
            InputError: there is no server, or a file with tokens can be read by others.
        """
        server = server or os.environ.get(credentials.SERVER)
        if not server:
            raise InputError(f"a client needs a server; found none: name one, or set {credentials.SERVER}")
        token = credentials.token_for(server, Home.locate().path) if token is None else credentials.checked(token)
        self._connection = Connection(server, token, timeout_s=timeout_s)
        self.server = self._connection.server
        if token is not None and not (self._connection.encrypted or self._connection.on_loopback):
            text = f"{self.server} is not encrypted: the token, and all else, can be read on the way; use https"
            warnings.warn(text, PlainHttpWarning, stacklevel=2)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    # -- specs

    def submit(
        self,
        spec: str | Path,
        *,
        name: str | None = None,
        priority: int = 0,
        shared: bool = False,
        idempotency_key: str | None = None,
    ) -> Accepted:
        """Submits a sweep; however often the request has to be sent, there is one.

        Args:
            spec: its text, or the path of its file.
            name: in place of the spec's own.
            priority: below 0: after your others; above 0: before everybody's, which takes scope admin.
            shared: whether every user may see the sweep.
            idempotency_key: what makes this submission one with an earlier one of yours; None for a new one.

        Raises:
            SpecError: every fault of it.
            InputError: it cannot run there, or not be sent.
        """
        text, shown, source = _spec_of(spec)
        asked = {**source, "priority": priority, "shared": shared} | ({} if name is None else {"name": name})
        headers = _YAML | {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        sent = {"content": text, "params": asked, "headers": headers}
        return self._model(Accepted, "POST", "/v1/sweeps", source=shown, least_s=_HEAVY_S, **sent)

    def plan(self, spec: str | Path, *, timed: bool = False) -> Plan:
        """What a spec would run there."""
        text, shown, source = _spec_of(spec)
        sent = {"content": text, "params": {**source, "timed": timed}, "headers": _YAML}
        return self._model(Plan, "POST", "/v1/plan", source=shown, least_s=_HEAVY_S, **sent)

    def translate(self, **asked: Any) -> dict[str, Any]:
        """A training run with another alpha, lr or init scale, as `lora-sweeps translate --json` prints it.

        Args:
            asked: the options of `lora-sweeps translate`: `optimizer="adamw", rank=8, alpha=16, lr=1e-4, to_alpha=32`.
        """
        found: dict[str, Any] = self._connection.ask("POST", "/v1/translate", json=asked).json()
        return found

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a spec."""
        found: dict[str, Any] = self._connection.ask("GET", "/v1/schema").json()
        return found

    # -- looking

    def ready(self) -> Health:
        """Whether the service can work; raises where it cannot, or does not know the token."""
        return self._model(Health, "GET", "/readyz")

    def list(
        self, *, state: Sequence[QueueState] = (), owner: str | None = None, name: str | None = None
    ) -> Iterator[SweepSummary]:
        """The sweeps that you may see, latest first.

        Args:
            state: only these.
            owner: only this user's.
            name: only those of this name.
        """
        only = {key: value for key, value in (("owner", owner), ("name", name)) if value is not None}
        asked: dict[str, Any] = {"limit": _PAGE, "state": tuple(state)} | only
        while True:
            page = self._model(SweepPage, "GET", "/v1/sweeps", params=asked)
            yield from page.sweeps
            if page.next is None:
                return
            asked["after"] = page.next

    def status(self, sweep: str) -> SweepStatus:
        """A sweep: its state, progress, best point, plan, and where it is in MLflow."""
        return self._model(SweepStatus, "GET", _path(sweep))

    def events(self, sweep: str, *, after: int = 0) -> Iterator[Record]:
        """A sweep's events: those that were, then those to come, until the sweep has come to its end.

        A connection that breaks is made again, for as long as the service is away for less than five minutes.

        Args:
            sweep: its id, its name, or `last`.
            after: only events after this number.
        """
        sweep = self.status(sweep).sweep  # `last` may be another one by the time of a second connection
        for sent in self._connection.listen(_path(sweep, f"events?after={after}"), after=after):
            if sent.event == "end":
                return
            yield _record_of(sent.data)

    def logs(self, sweep: str, offset: int | None = None) -> LogPart:
        """What a sweep's drivers wrote: the end of it, or a stretch from an offset on."""
        asked = {} if offset is None else {"offset": offset}
        return self._model(LogPart, "GET", _path(sweep, "logs"), params=asked)

    def follow_logs(self, sweep: str, offset: int | None = None) -> Iterator[LogPart]:
        """The same, and what is added to it until the sweep has come to its end."""
        sweep = self.status(sweep).sweep
        return following.follow_logs(self.logs, self.status, sweep, offset, every_s=_LOOK_EVERY_S)

    # -- changing

    def cancel(self, sweep: str) -> SweepStatus:
        """Cancels a sweep: it ends in order, and may be resumed."""
        return self._model(SweepStatus, "POST", _path(sweep, "cancel"))

    def resume(self, sweep: str) -> SweepStatus:
        """Queues a sweep again that was paused, failed or cancelled; it goes on where it left off."""
        return self._model(SweepStatus, "POST", _path(sweep, "resume"), again=False)

    def extend(self, sweep: str, trials: int) -> SweepStatus:
        """Gives a sweep more trials, so that it trains so many in all, and queues it again."""
        return self._model(SweepStatus, "POST", _path(sweep, "extend"), again=False, json={"trials": trials})

    # -- results

    def best(self, sweep: str) -> Best:
        """The best point, with every number that a trainer asks for."""
        return self._model(Best, "GET", _path(sweep, "best"))

    def report(self, sweep: str, format: ReportFormat = "md") -> str:
        """The collapse report."""
        asked = {"format": format}
        return self._connection.ask("GET", _path(sweep, "report"), least_s=_HEAVY_S, params=asked).text

    def export(self, sweep: str, format: str, *, alpha: str | float | None = None, trial: int | None = None) -> Export:
        """A point in a trainer's config format, with the texts of its files.

        Args:
            sweep: its id, its name, or `last`.
            format: peft, trl, axolotl, llamafactory, unsloth, hf_trainer or loralib.
            alpha: a number, or a rule such as `2*rank`; None for that of the trainer's default init.
            trial: this one and not the best.
        """
        given = (("alpha", None if alpha is None else str(alpha)), ("trial", trial))
        asked = {"format": format} | {key: value for key, value in given if value is not None}
        return self._model(Export, "GET", _path(sweep, "export"), params=asked)

    def adapter(
        self, sweep: str, directory: Path, *, trial: int | None = None, most_bytes: int = _MOST_ADAPTER_BYTES
    ) -> tuple[Path, ...]:
        """Writes the trained adapter into a directory, as a PEFT folder; returns its files.

        Args:
            sweep: its id, its name, or `last`.
            directory: where to; made where it is missing.
            trial: this one and not the best.
            most_bytes: more is not taken.

        Raises:
            InputError: there is none, or what came is no adapter.
            OSError: the disk refused.
        """
        asked = {} if trial is None else {"trial": trial}
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as archive:
            path = _path(sweep, "adapter")
            self._connection.download(path, archive, most_bytes=most_bytes, least_s=_HEAVY_S, params=asked)
            return unpack(archive, directory, most_bytes=most_bytes)

    def _model(self, model: type[_Model], method: str, path: str, **asked: Any) -> _Model:
        response = self._connection.ask(method, path, **asked)
        try:
            return model.model_validate_json(response.content, extra="ignore")  # a newer service may say more
        except ValidationError:
            raise self._connection.stranger(response) from None


def _path(sweep: str, rest: str = "") -> str:
    if not _SWEEP.fullmatch(sweep):
        raise SweepNotFoundError(f"a sweep must be named by its id, its name or `last`; found {sweep[:100]!r}")
    return f"/v1/sweeps/{sweep}" + (f"/{rest}" if rest else "")


def _spec_of(spec: str | Path) -> tuple[bytes, str, dict[str, str]]:
    """A spec's text, what its user calls it, and what the server is told of that."""
    if isinstance(spec, str):
        return spec.encode(), "spec", {}
    return read_text(spec).encode(), str(spec), {"source": spec.name} if _FILE.fullmatch(spec.name) else {}


# -- events ------------------------------------------------------------------------------------------------------------


def _record_of(data: str) -> Record:
    try:
        sent = loads(data)
        at_s = datetime.fromisoformat(sent["at"]).timestamp()
        event: Event = _mended(EVENT.validate_python, sent["event"])
        if isinstance(event, Certified):
            _mended(Certificate.model_validate, event.certificate)
        return Record(sent["seq"], at_s, event)
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            "a service must send events that this version knows; one of them is none: it is of another version, whose "
            "client can read them"
        ) from error


def _mended(validate: Callable[..., _T], raw: Any) -> _T:
    """What `validate` makes of `raw`, which is changed: a number that is none is null on the wire, and NaN here."""
    try:
        return validate(raw, extra="ignore")
    except ValidationError as error:
        nulls = [one["loc"] for one in error.errors(include_url=False) if one["input"] is None]
    for place in nulls:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            _set(raw, place, float("nan"))
    return validate(raw, extra="ignore")


def _set(raw: Any, place: tuple[int | str, ...], value: float) -> None:
    if isinstance(raw, dict) and place[0] == raw.get("kind"):
        place = place[1:]  # the union's own step
    for key in place[:-1]:
        raw = raw[key]
    raw[place[-1]] = value
