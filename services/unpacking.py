"""Unpacks an archive that came over the network: plain files into one directory, and nothing else anywhere."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from sweeps.errors import InputError

_FOLDER = "adapter/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_FILES = 64


def unpack(archive: IO[bytes], directory: Path, *, most_bytes: int) -> tuple[Path, ...]:
    """Writes the files of an adapter's archive into a directory, which is made where it is missing.

    Everything is looked at before anything is written, and every file appears whole or not at all.

    Args:
        archive: a ZIP archive with files `adapter/NAME`; not trusted.
        directory: where to.
        most_bytes: of all files together.

    Raises:
        InputError: it holds anything but plain files with plain names, or too much.
        OSError: the disk refused.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = {_checked_name(member): member for member in packed.infolist()}
            if len(members) != len(packed.infolist()) or len(members) > _MOST_FILES:
                raise _refused(f"at most {_MOST_FILES} files, each once", f"{len(packed.infolist())}")
            if (size := sum(member.file_size for member in members.values())) > most_bytes:
                raise _refused(f"at most {most_bytes:,} bytes", f"{size:,}")
            directory.mkdir(parents=True, exist_ok=True)
            for name, member in members.items():
                _write(packed, member, directory / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _refused("a ZIP archive", f"something else ({error})") from None
    return tuple(directory / name for name in members)


def _checked_name(member: zipfile.ZipInfo) -> str:
    name = member.filename.removeprefix(_FOLDER)
    kind = stat.S_IFMT(member.external_attr >> 16)
    if not _NAME.fullmatch(name) or kind not in (0, stat.S_IFREG):
        raise _refused("plain files with plain names", ascii(member.filename[:100]))
    return name


def _write(packed: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    # Replaced and not opened: a link that lies there is not followed.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file, packed.open(member) as source:
            shutil.copyfileobj(source, file)  # never more than its directory says: zipfile sees to that
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _refused(required: str, found: str) -> InputError:
    return InputError(f"an adapter's archive must hold {required}; found {found}")
