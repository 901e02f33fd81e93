"""Where members' states lie: in a directory that all workers see, or at a URL that all of them reach.

place   an absolute path, or a URL: `s3://bucket/path`, `gs://`, `abfss://` and `hdfs://` as pyarrow opens them, any
        other scheme by fsspec and the package that it asks for

Keys are never part of a place: each node takes them from its environment or its cloud's identity, as pyarrow and fsspec
do.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from lora_core.files import Files, LocalFiles
from sweeps.errors import StorageError
from sweeps.home import Home
from sweeps.secrecy import has_secret, hide_passwords

_VARIABLE = "LORA_SWEEPS_CHECKPOINTS"

_WHOLE_OBJECTS = ("s3", "gcs", "abfs")
"""pyarrow's file systems in which nobody sees half of what is being written."""

_GCS_LIMIT = "retry_limit_seconds"

_PATIENCE_S = 300.0
"""How long a store that was reached before may be away, until whoever asked is told."""

_LONGEST_PAUSE_S = 15.0

_T = TypeVar("_T")


def configured_place() -> str | None:
    """The place that the environment names (`LORA_SWEEPS_CHECKPOINTS`); None where it names none.

    Raises:
        StorageError: it is no absolute path and no URL, or has a secret in it.
    """
    written = os.environ.get(_VARIABLE)
    if not written:
        return None
    if has_secret(written):
        raise StorageError(
            f"{_VARIABLE} is kept in the ledger, so it must hold no secret; found one in {hide_passwords(written)}: "
            "leave it out, and give every node its keys in its environment or by its cloud's identity"
        )
    if "://" not in written and not written.startswith("/"):
        raise StorageError(
            f"{_VARIABLE} must be an absolute path or a URL such as s3://bucket/path; found {written!r}: write the "
            "whole path"
        )
    return _path_of_file_url(written) or written.rstrip("/")


def place_of(home: Home, sweep: str, checkpoints: str) -> str:
    """The place of a sweep's checkpoints.

    Args:
        home: the state directory.
        sweep: the sweep's id.
        checkpoints: as `SweepCreated` has it.
    """
    return below(checkpoints, sweep) if checkpoints else str(home.checkpoints(sweep))


def is_url(place: str) -> bool:
    """Whether a place is a URL, and no directory."""
    return "://" in place


def below(place: str, directory: str) -> str:
    """The place of a directory below another place; a URL's settings (`?region=…`) stay at its end."""
    base, query, settings = place.partition("?") if is_url(place) else (place, "", "")
    return f"{base.rstrip('/')}/{directory}{query}{settings}"


def files_in(place: str, directory: str) -> Files:
    """The files of a directory below a place.

    Args:
        place: an absolute path or a URL.
        directory: relative to it, with slashes.
    """
    return RemoteFiles(place, directory) if is_url(place) else LocalFiles(Path(place) / directory)


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """A directory at a URL. A store that is away for a while is waited for.

    Attributes:
        place: the URL.
        directory: below it.
        patience_s: how long it is waited for.
    """

    place: str
    directory: str
    patience_s: float = _PATIENCE_S

    def read(self, name: str) -> bytes:
        """See `Files.read`."""

        def read() -> bytes:
            filesystem, root = _opened(self.place)
            with filesystem.open_input_file(f"{root}/{self.directory}/{name}") as file:
                data: bytes = file.read()
                return data

        return self._patiently(read)

    def write(self, name: str, data: bytes) -> None:
        """See `Files.write`."""

        def write() -> None:
            filesystem, root = _opened(self.place)
            path = f"{root}/{self.directory}/{name}"
            if filesystem.type_name in _WHOLE_OBJECTS:
                _put(filesystem, path, data)
                return
            filesystem.create_dir(f"{root}/{self.directory}", recursive=True)
            temporary = f"{path}.{secrets.token_hex(8)}.tmp"
            _put(filesystem, temporary, data)
            filesystem.move(temporary, path)

        self._patiently(write)

    def remove(self, name: str) -> None:
        """See `Files.remove`."""

        def remove() -> None:
            filesystem, root = _opened(self.place)
            try:
                filesystem.delete_file(f"{root}/{self.directory}/{name}")
            except FileNotFoundError:
                return

        self._patiently(remove)

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """Calls until it works; what no waiting mends is raised at once."""
        deadline_s, pause_s = time.monotonic() + self.patience_s, 0.1
        while True:
            try:
                return call()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                if time.monotonic() + pause_s > deadline_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def __str__(self) -> str:
        return below(self.place, self.directory)


# -- trying a place out ------------------------------------------------------------------------------------------------


def probe(place: str) -> None:
    """Writes a small file below a place, reads it back and removes it.

    Raises:
        StorageError: one of these cannot be done.
    """
    leave_mark(place, name := f"probe-{secrets.token_hex(8)}")
    try:
        check_mark(place, name)
    finally:
        remove_mark(place, name)


def leave_mark(place: str, name: str) -> None:
    """Writes a file of that name, which holds its own name.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        _marks(place).write(name, name.encode())
    except StorageError:
        raise
    except Exception as error:  # fsspec's file systems raise what they like
        raise _refused(place, "written to", error) from None


def check_mark(place: str, name: str) -> None:
    """Reads what `leave_mark` has written, here or on another machine.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    try:
        found = _marks(place).read(name)
    except FileNotFoundError:
        raise StorageError(
            f"checkpoints must lie where all nodes see them; what was written to {place} elsewhere is not there: "
            "use a directory that all nodes share, or an object store"
        ) from None
    except StorageError:
        raise
    except Exception as error:
        raise _refused(place, "read", error) from None
    if found != name.encode():
        raise StorageError(f"{place} must give back what was written to it; it gave {len(found)} other bytes")


def remove_mark(place: str, name: str) -> None:
    """Removes what `leave_mark` has written.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        _marks(place).remove(name)
    except StorageError:
        raise
    except Exception as error:
        raise _refused(place, "cleared", error) from None


def _marks(place: str) -> Files:
    return RemoteFiles(place, "probes", patience_s=0.0) if is_url(place) else LocalFiles(Path(place))


def _refused(place: str, what: str, error: Exception) -> StorageError:
    return StorageError(
        f"checkpoints must lie where every worker can read and write; {place} cannot be {what}: "
        f"{hide_passwords(str(error) or type(error).__name__)}; mend that, or set {_VARIABLE} to another place"
    )


# -- pyarrow and fsspec ------------------------------------------------------------------------------------------------


@cache
def _opened(place: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, opened once a process: S3 asks for the bucket's region each time."""
    import fsspec
    import pyarrow
    import pyarrow.fs

    if urlsplit(place).scheme in ("gs", "gcs") and _GCS_LIMIT not in place:
        # Else pyarrow itself waits for a quarter of an hour, and nobody can interrupt it.
        place += f"{'&' if '?' in place else '?'}{_GCS_LIMIT}=15"
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(place)
    except pyarrow.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise StorageError(f"{_VARIABLE} must be a URL that pyarrow opens; {place} is not: {error}") from None
        try:
            opened, path = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError, OSError) as error:
            raise StorageError(
                f"{_VARIABLE} must be a URL that pyarrow or fsspec opens; {place} is not: {error}; install what it "
                "asks for on every node, or use s3://, gs:// or abfss://"
            ) from None
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(opened))
    return filesystem, str(path).rstrip("/")


def _put(filesystem: Any, path: str, data: bytes) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def _path_of_file_url(place: str) -> str | None:
    """The path of a `file://` URL, which is a directory like others, and is written like one; else None."""
    parts = urlsplit(place)
    return unquote(parts.path).rstrip("/") if parts.scheme == "file" else None
