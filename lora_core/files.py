"""Writes files so that no reader, and no power cut, finds half of one."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """A directory, wherever it lies. As a string: its name for people."""

    def read(self, name: str) -> bytes:
        """What a file holds.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    def write(self, name: str, data: bytes) -> None:
        """Writes a file so that it is there whole or not at all, in place of what was there.

        Raises:
            OSError: it cannot be written.
        """

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """A directory of a file system, made with its first file."""

    directory: Path

    def read(self, name: str) -> bytes:
        """See `Files.read`."""
        return (self.directory / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `Files.write`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / name, data)

    def remove(self, name: str) -> None:
        """See `Files.remove`."""
        (self.directory / name).unlink(missing_ok=True)

    def __str__(self) -> str:
        return str(self.directory)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Writes a file so that it is there whole or not at all, even if the power fails: temporary name, fsync, rename,
    fsync.

    Args:
        path: where.
        data: what.
        mode: the file's permissions.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # the rename itself
    finally:
        os.close(parent)
