"""Where lora-sweeps keeps its state: `.lora-sweeps/` in the working directory, or `LORA_SWEEPS_HOME`."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.errors import StateError

if TYPE_CHECKING:  # who only looks for the directory needs no database
    from sweeps.ledger import Ledger

LOCK_VARIABLE = "LORA_SWEEPS_LOCK"
"""Names, in the environment of a driver, the open file with which it was given the right to drive."""

_LOCK_PATIENCE_S = 0.5

_DATABASE, _DATABASE_FILE = "LORA_SWEEPS_DATABASE", "LORA_SWEEPS_DATABASE_FILE"


def own_cache() -> Path:
    """Where a node that does not see the state directory keeps what tasks keep, and can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-sweeps"


def database_url() -> str | None:
    """The URL of a shared ledger, from the environment or from the file that it names; None for a file of our own.

    Raises:
        StateError: the file cannot be read.
    """
    path = os.environ.get(_DATABASE_FILE)
    if not path:
        return os.environ.get(_DATABASE) or None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"{_DATABASE_FILE} must name a file that holds the URL of the ledger's database; {path} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from None


@dataclass(frozen=True, slots=True)
class Home:
    """The state directory, readable by its owner only.

    Attributes:
        path: absolute.
    """

    path: Path

    @classmethod
    def locate(cls) -> Home:
        """The state directory, which may not be there."""
        return cls(Path(os.environ.get("LORA_SWEEPS_HOME") or ".lora-sweeps").absolute())

    @property
    def has_ledger(self) -> bool:
        """Whether any sweep was ever entered here, or may have been elsewhere."""
        return database_url() is not None or (self.path / "ledger.db").exists()

    def ledger(self) -> Ledger:
        """Opens the ledger: `LORA_SWEEPS_DATABASE`, else a file of the state directory, which it makes.

        Raises:
            StateError: it cannot be opened or written.
        """
        from sweeps.ledger import Ledger

        url = database_url()
        return Ledger.in_directory(self.path) if url is None else Ledger(url)

    @classmethod
    def open(cls) -> Home:
        """Finds the state directory, making it where it is missing.

        Raises:
            StateError: it cannot be made or written.
        """
        home = cls.locate()
        path = home.path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(f"no permission to write in {path}")
        except OSError as error:
            raise StateError(
                f"the state directory must be one that can be written; {path} is not ({error.strerror or error}); "
                "change to another working directory or set LORA_SWEEPS_HOME"
            ) from error
        return home

    @property
    def cache(self) -> Path:
        """What tasks keep, and can make again."""
        return self.path / "cache"

    @property
    def ray_token(self) -> Path:
        """The token of local Ray clusters; whoever has it can run code as this user."""
        return self.path / "ray-token"

    def checkpoints(self, sweep: str) -> Path:
        """Members' states of a sweep."""
        return self.path / "checkpoints" / sweep

    def report(self, sweep: str) -> Path:
        """Report and exports of a sweep."""
        return self.path / "reports" / sweep

    def logs(self, sweep: str) -> Path:
        """What the drivers wrote that a service started for a sweep."""
        return self.path / "logs" / f"{sweep}.log"

    @contextmanager
    def driving(self, sweep: str) -> Iterator[None]:
        """Holds the right to drive a sweep; the system takes it back when the process ends, however it ends.

        A process that was started with the right already in hand (see `hand_over`) keeps it.

        Raises:
            StateError: another process drives the sweep.
        """
        given = os.environ.pop(LOCK_VARIABLE, None)
        descriptor = int(given) if given else self._lock(sweep)
        os.set_inheritable(descriptor, False)  # else what the driver starts would hold the right beyond its end
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def hand_over(self, sweep: str) -> Iterator[int]:
        """Takes the right to drive a sweep for a process that is about to be started.

        Yields the descriptor that the process must inherit, under a number that `LOCK_VARIABLE` tells it. From here on
        somebody has the right at every moment: first this process, then that one.

        Raises:
            StateError: a process drives the sweep.
        """
        descriptor = self._lock(sweep)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _lock(self, sweep: str) -> int:
        locks = self.path / "locks"
        locks.mkdir(exist_ok=True)
        descriptor = os.open(locks / sweep, os.O_RDWR | os.O_CREAT, 0o600)
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError:
                # Whoever asks `is_driven` holds it for a moment.
                if time.monotonic() < deadline_s:
                    time.sleep(0.01)
                    continue
                os.close(descriptor)
                raise StateError(
                    f"one process drives a sweep; another one drives {sweep} now: wait for it or stop it"
                ) from None

    def driver_pid(self, sweep: str) -> int | None:
        """The process that drives the sweep now; None where none does, or it has not said so yet."""
        if not self.is_driven(sweep):
            return None
        text = (self.path / "locks" / sweep).read_text()
        return int(text) if text.isdecimal() else None

    def is_driven(self, sweep: str) -> bool:
        """Whether a process drives the sweep now."""
        try:
            with (self.path / "locks" / sweep).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False
