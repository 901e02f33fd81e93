"""Events of sweeps as they happen, to any number of listeners: one look at the ledger serves them all."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from services.store import OPEN
from services.views import utc
from sweeps.errors import InputError
from sweeps.ledger import Ledger

_LOG = logging.getLogger("lora_sweeps")

_LOOK_EVERY_S = 0.25
_KEEPALIVE_S = 15.0
_RECENT = 256
"""Events of a sweep that are kept ready for its listeners; who is further behind reads the ledger."""

_BATCH = 500


@dataclass(frozen=True, slots=True)
class Sent:
    """An event as it goes over the wire.

    Attributes:
        seq: its number.
        data: in the form of server-sent events.
        state: that the sweep moved to in its queue; empty where this is another kind of event.
    """

    seq: int
    data: bytes
    state: str


@dataclass(slots=True)
class _Channel:
    """A sweep that somebody listens to."""

    last_seq: int = 0
    listeners: int = 0
    complete_after: int = 0
    """`recent` has every event after this one."""
    recent: deque[Sent] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, sent: list[Sent]) -> None:
        self.recent.extend(sent)
        while len(self.recent) > _RECENT:
            self.complete_after = self.recent.popleft().seq


class _Permit:
    """Whether a listener may still hear: asked for again once the last answer is too old."""

    def __init__(self, allowed: Callable[[], bool]) -> None:
        self._allowed, self._asked_s = allowed, time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds until it must be asked for again."""
        return max(0.0, self._asked_s + _KEEPALIVE_S - time.monotonic())

    async def holds(self) -> bool:
        """Asks, if it is time."""
        if self.left_s > 0:
            return True
        holds = await asyncio.to_thread(self._allowed)
        self._asked_s = time.monotonic()
        return holds


class Hub:
    """Looks at the ledger for everybody who listens."""

    def __init__(self, ledger: Ledger, shown: Callable[[str], str] = str) -> None:
        """Listens to nothing yet.

        Args:
            ledger: where events come from.
            shown: what listeners see of a text in which places of this machine may stand.
        """
        self._ledger, self._shown = ledger, shown
        self._channels: dict[str, _Channel] = {}
        self._closing = asyncio.Event()

    @property
    def listeners(self) -> int:
        """How many listen."""
        return sum(channel.listeners for channel in self._channels.values())

    async def run(self) -> None:
        """Looks until it is closed."""
        while not self._closing.is_set():
            try:
                await self._look()
            except InputError:
                pass  # a database that is away is asked again
            except Exception:
                _LOG.exception("events could not be looked at; tried again")  # else all streams would fall silent
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _LOOK_EVERY_S)

    def close(self) -> None:
        """Lets every listener go."""
        self._closing.set()
        for channel in self._channels.values():
            channel.news.set()

    async def listen(
        self, sweep: str, *, after: int, state: str, allowed: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[bytes]:
        """The events of a sweep after one, as server-sent events; the last, named `end`, once it has come to its end.

        Args:
            sweep: its id.
            after: number of the last event that the listener has.
            state: where the sweep stands in the queue.
            allowed: whether the listener may still hear; asked in a thread, as often as silence is broken.
        """
        permit, silent = _Permit(allowed), False
        channel = self._channels.setdefault(sweep, _Channel())
        channel.listeners += 1
        try:
            while not self._closing.is_set():
                news = channel.news
                try:
                    if not await permit.holds():
                        return
                    if silent:
                        silent = False
                        yield KEEPALIVE_COMMENT
                    fresh = await self._fresh(sweep, channel, after)
                except InputError:  # the database is away: better to wait for it than to have every listener come again
                    await asyncio.sleep(_LOOK_EVERY_S)
                    continue
                for sent in fresh:
                    after, state = sent.seq, sent.state or state
                    yield sent.data
                    if permit.left_s <= 0:  # a slow listener takes long for these
                        break
                if fresh:
                    continue
                if state not in OPEN:
                    yield format_sse_event(event="end", data_str=json.dumps({"state": state}), id=str(after))
                    return
                try:
                    await asyncio.wait_for(news.wait(), permit.left_s)
                except TimeoutError:
                    silent = True
        finally:
            channel.listeners -= 1
            if not channel.listeners:
                self._channels.pop(sweep, None)

    async def _fresh(self, sweep: str, channel: _Channel, after: int) -> list[Sent]:
        if channel.last_seq and after >= channel.complete_after:
            return [sent for sent in channel.recent if sent.seq > after]
        rows = await asyncio.to_thread(self._ledger.read_raw, sweep, after=after, limit=_BATCH)
        return [on_the_wire(*row, self._shown) for row in rows]

    async def _look(self) -> None:
        if not self._channels:
            return
        last = await asyncio.to_thread(self._ledger.last_seqs, list(self._channels))
        for sweep, seq in last.items():
            channel = self._channels.get(sweep)
            if channel is None or seq <= channel.last_seq:
                continue
            if channel.last_seq:
                rows = await asyncio.to_thread(self._ledger.read_raw, sweep, after=channel.last_seq, limit=_BATCH)
                channel.add([on_the_wire(*row, self._shown) for row in rows])
                seq = rows[-1][0] if rows else seq
            else:
                channel.complete_after = seq
            channel.last_seq = seq
            channel.news.set()
            channel.news = asyncio.Event()


def on_the_wire(seq: int, at_s: float, payload: str, shown: Callable[[str], str] = str) -> Sent:
    """An event as listeners get it; `shown` is what they see of a text in which places of this machine may stand."""
    event = json.loads(payload)
    data = json.dumps({"seq": seq, "at": utc(at_s), "event": _finite(event)}, separators=(",", ":"))
    state = event["state"] if event["kind"] == "queue_moved" else ""
    return Sent(seq, format_sse_event(event=event["kind"], data_str=shown(data), id=str(seq)), state)


def _finite(value: Any) -> Any:
    """A diverged loss is NaN in the ledger, and nothing in JSON."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list():
            return [_finite(each) for each in value]
        case _:
            return value
