"""Reads sweeps for many askers: folded records are kept, and only what is new is folded into them; and logs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.errors import SweepNotFoundError
from sweeps.ledger import Ledger
from sweeps.records import SweepRecord, fold, fold_into
from sweeps.secrecy import hide_passwords

_MOST = 128
"""Records in memory, the latest used ones: a sweep of a thousand trials takes about a megabyte."""


class Records:
    """Sweeps as the ledger has them now. Safe to use from several threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, sweep: str) -> Iterator[SweepRecord]:
        """A sweep up to the ledger's last event; it stays as it is for as long as the context lasts.

        Raises:
            SweepNotFoundError: the ledger has none of this id.
        """
        with self._lock:
            kept = self._kept.setdefault(sweep, _Kept())
            self._kept.move_to_end(sweep)
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        with kept.lock:
            events = self._ledger.read(sweep, after=kept.record.last_seq if kept.record else 0)
            if kept.record is not None:
                fold_into(kept.record, events)
            elif events:
                kept.record = fold(sweep, events)
            else:
                raise SweepNotFoundError(f"a sweep must be one of the ledger's; found {sweep!r}")
            yield kept.record


@dataclass(slots=True)
class _Kept:
    lock: threading.Lock = field(default_factory=threading.Lock)
    record: SweepRecord | None = None


def read_log(path: Path, *, offset: int | None, most_bytes: int) -> tuple[str, int, int]:
    """A stretch of the drivers' log from an offset, else its end: the text, where it begins, where to go on.

    Whole lines only, so that no secret is cut in two and shown for it.
    """
    if not path.exists():
        return "", 0, 0
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = max(0, size - most_bytes) if offset is None else min(offset, size)
        file.seek(max(0, start - 1))
        raw = file.read(most_bytes + (start > 0))
    if start:  # within a line: from the next one on
        if not (cut := raw.find(b"\n") + 1):
            start += most_bytes if len(raw) > most_bytes else 0
            return "", start, start
        raw, start = raw[cut:], start - 1 + cut
    end = raw.rfind(b"\n") + 1 or (len(raw) if len(raw) == most_bytes else 0)
    return hide_passwords(raw[:end].decode(errors="replace")), start, start + end
