"""Where lora-sweeps keeps its state: `.lora-sweeps/` in the working directory, or `LORA_SWEEPS_HOME`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sweeps.errors import StateError


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
        """Whether any sweep was ever entered here."""
        return (self.path / "ledger.db").exists()

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

    @contextmanager
    def driving(self, sweep: str) -> Iterator[None]:
        """Holds the right to drive a sweep; the system takes it back when the process ends, however it ends.

        Raises:
            StateError: another process drives the sweep.
        """
        locks = self.path / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / sweep).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StateError(
                    f"one process drives a sweep; another one drives {sweep} now: wait for it or stop it"
                ) from None
            yield

    def is_driven(self, sweep: str) -> bool:
        """Whether a process drives the sweep now."""
        try:
            with (self.path / "locks" / sweep).open() as file:
                # Shared, so that asking does not keep a driver out for the moment that it takes.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False
