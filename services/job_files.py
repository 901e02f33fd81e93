"""What is sent to a cluster with a spec: the spec alone, or a directory that has it and what it names.

A place in a spec that only this machine has is found before anything is sent, with its line; and so is a secret: a file
of the state directory, or one that the environment names, by whatever path or link it would be sent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from services import credentials, ray_client
from sweeps.errors import Fault, InputError, SpecError
from sweeps.home import Home
from sweeps.spec import SpecDocument

_STATE = ".lora-sweeps"

_KEPT_BACK = [_STATE, "mlflow.db", "mlflow.db-*", "mlruns", "mlartifacts"]
"""State of sweeps that ran here: among it tokens, and nothing that a new sweep reads."""

_SECRET_FILES = ("LORA_SWEEPS_DATABASE_FILE", credentials.TOKEN_FILE, "RAY_AUTH_TOKEN_PATH")
"""Variables that name a file with a secret."""

_RAYS_TOKEN = Path("~/.ray/auth_token")
"""Where Ray looks for its token, if nothing says where it is."""

_PATTERN_SIGNS = re.compile(r"[\\*?\[\]!# ]")

_SHOWN = 3
_ELSEWHERE = ("/", "~")
"""What begins so is the head's to find: a path, and no path of this directory."""

_MIB = 2**20


def check_alone(document: SpecDocument, spec: Path) -> None:
    """Makes sure that a spec can be sent alone.

    Raises:
        SpecError: it names files that lie on this machine.
    """
    required = "what the head has, for the spec is sent alone"
    faults = [
        document.fault(key, required, f"{written}, which lies here", "add --working-dir DIR to send its directory")
        for key, written, _ in _named(document, spec)
    ]
    if faults:
        raise SpecError(document.source, tuple(faults))


def check_directory(document: SpecDocument, spec: Path, directory: Path) -> list[str]:
    """Makes sure that a directory can be sent, and has the spec and what it names.

    Returns:
        What of it is not sent, as patterns.

    Raises:
        InputError: it cannot.
    """
    root = directory.resolve()
    if not root.is_dir():
        raise InputError(f"--working-dir must be a directory; {directory} is none")
    if not spec.resolve().is_relative_to(root):
        raise InputError(f"--working-dir must be a directory that has the spec in it; {spec} is not in {directory}")
    excludes = [*_KEPT_BACK, *_state_in(root)]
    try:
        sent = ray_client.files_sent(root, excludes)
    except OSError as error:
        raise InputError(f"--working-dir must be readable; {error.filename or directory}: {error.strerror}") from error
    _check_size(directory, sent)
    _check_no_secret(root, sent)
    if str(spec.resolve().relative_to(root)) not in sent:
        raise InputError(f"--working-dir must send the spec; {spec} is left out by a .gitignore or .rayignore there")
    if faults := list(_left_out(document, spec, root, sent)):
        raise SpecError(document.source, tuple(faults))
    return excludes


def _check_size(directory: Path, sent: dict[str, int]) -> None:
    total = sum(sent.values())
    if total > ray_client.MOST_SENT_BYTES:
        largest = sorted(sent, key=lambda name: -sent[name])[:_SHOWN]
        named = ", ".join(f"{name} {sent[name] / _MIB:.0f} MiB" for name in largest)
        raise InputError(
            f"--working-dir must be {ray_client.MOST_SENT_BYTES // _MIB} MiB or less, which is what Ray's dashboard "
            f"takes; {directory} has over {total // _MIB} MiB, among them {named}; leave them out with a .rayignore, "
            "put large data where all nodes see it, and name that path in the spec"
        )


def _check_no_secret(root: Path, sent: dict[str, int]) -> None:
    """Looks at the files themselves, for Ray follows links, and a pattern may miss what it was meant for."""
    state = Home.locate().path
    named = {name: os.environ.get(name) for name in _SECRET_FILES}
    files = dict.fromkeys([*credentials.files(state), _RAYS_TOKEN.expanduser()], "holds tokens")
    files |= {Path(path).expanduser(): f"is the file that {name} names" for name, path in named.items() if path}
    secret = {inode: why for path, why in files.items() if (inode := _inode(path))}
    homes = {_inode(state)} - {None}
    for name in sent:
        path = (root / name).resolve()
        why = secret.get(_inode(path) or (0, 0))
        if why is None and not homes.isdisjoint(map(_inode, path.parents)):
            why = f"lies in the state directory, {state}"
        elif why is None and not path.is_relative_to(root) and _STATE in path.parts:
            why = f"leads to {path}, in a state directory"
        if why is not None:
            raise InputError(
                f"--working-dir must send no tokens, and nothing of a state directory; {root / name} {why}; leave it "
                "out with a .rayignore, or put the spec and what it names into a directory of their own"
            )


def _inode(path: Path) -> tuple[int, int] | None:
    """Which file this is, whatever it is called; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _state_in(root: Path) -> list[str]:
    """Patterns for the state directory, as it is called and where it is."""
    home = Home.locate().path
    places = {home.resolve(), home.parent.resolve() / home.name}
    inside = (place.relative_to(root) for place in places if place != root and place.is_relative_to(root))
    return ["/" + _PATTERN_SIGNS.sub(r"\\\g<0>", str(place)) for place in inside]


def _left_out(document: SpecDocument, spec: Path, root: Path, sent: dict[str, int]) -> list[Fault]:
    faults = []
    for key, written, path in _named(document, spec):
        if not path.is_relative_to(root):
            found, way_out = f"{written}, which lies outside", "name a directory above both"
        elif not any(Path(name).is_relative_to(path.relative_to(root)) for name in sent):
            found, way_out = f"{written}, which a .gitignore or .rayignore leaves out", "have it sent"
        else:
            continue
        faults.append(document.fault(key, "what is sent with --working-dir", found, way_out))
    return faults


def _named(document: SpecDocument, spec: Path) -> list[tuple[str, str, Path]]:
    """Keys of the spec that name something which lies here: as it is written, and where it is."""
    task: Any = document.yaml.value.get("task", {}) if isinstance(document.yaml.value, dict) else {}
    data = task.get("data", {})
    here = spec.resolve().parent
    places = [("task.model", task.get("model")), *((f"task.data.{key}", data.get(key)) for key in ("train", "eval"))]
    found = []
    for key, written in places:
        if isinstance(written, str) and not written.startswith(_ELSEWHERE) and (here / written).exists():
            found.append((key, written, (here / written).resolve()))
    if task.get("type") == "python" and isinstance(path := task.get("path", "."), str):
        module = here / path / task["entrypoint"].partition(":")[0].partition(".")[0]
        for one in (module, module.with_suffix(".py")):
            if one.exists() and not path.startswith(_ELSEWHERE):
                found.append(("task.entrypoint", one.name, one.resolve()))
    return found
