"""Where a driver keeps things that runs as a Ray job: not in the job's own directory, which Ray deletes.

Ray unpacks the files that come with a job below `SESSION/runtime_resources/working_dir_files/`, and a job begins there.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sweeps.errors import InputError, StateError
from sweeps.home import Home
from sweeps.records import read_sweep

_CHECKPOINTS = "LORA_SWEEPS_CHECKPOINTS"
_HOME = "LORA_SWEEPS_HOME"
_TRACKING = "MLFLOW_TRACKING_URI"


def is_passing(path: Path) -> bool:
    """Whether a path lies where Ray unpacks the files of jobs, and deletes them again."""
    parts = path.resolve().parts
    return any(pair == ("runtime_resources", "working_dir_files") for pair in itertools.pairwise(parts))


def check_lasts(home: Path, tracking_uri: str | None = None) -> None:
    """Makes sure that what a driver keeps is still there after its job; elsewhere than in a Ray job it always is.

    Where nobody has said where MLflow is, its database goes into the state directory, as a service has it.

    Args:
        home: the state directory.
        tracking_uri: what the spec says of MLflow.

    Raises:
        InputError: the state directory, or MLflow's database, lies in the directory of the job.
    """
    if is_passing(home):
        raise StateError(
            f"the state directory must outlive the Ray job that makes it; {home} lies with the job's files, which Ray "
            f"deletes; set {_HOME} to an absolute path, in the head's environment or with `ray job submit "
            '--runtime-env-json \'{"env_vars": {"LORA_SWEEPS_HOME": "/PATH"}}\'`, or let `lora-sweeps run SPEC '
            "--address http://HEAD:8265` submit the job"
        )
    if not is_passing(Path.cwd()):
        return
    from sweeps.tracking_address import absolute_uri, default_uri

    uri = tracking_uri or os.environ.get(_TRACKING)
    if not uri:
        os.environ[_TRACKING] = default_uri(home)
    elif absolute_uri(uri).startswith("sqlite:///") and is_passing(Path(absolute_uri(uri).removeprefix("sqlite:///"))):
        where = "tracking.uri" if tracking_uri else _TRACKING
        raise StateError(
            f"MLflow's database must outlive the Ray job that makes it; {where} is {uri}, which lies with the job's "
            "files, which Ray deletes; give an absolute path, or a server"
        )


def settle(home_default: Path) -> Home:
    """Says where a driver keeps its things where the head's environment does not: in the user's own directory."""
    if not os.environ.get(_HOME):
        os.environ[_HOME] = str(home_default)
    check_lasts(Home.locate().path)
    if not os.environ.get(_TRACKING):
        from sweeps.tracking_address import default_uri

        os.environ[_TRACKING] = default_uri(Home.locate().path)
    return Home.open()


@contextmanager
def kept_upload(home: Home, sweep: str) -> Iterator[None]:
    """Keeps a copy of the job's files, and moves there: a resumed sweep finds its data and code where they were.

    The copy is in the state directory, which all nodes see. Where checkpoints lie elsewhere, they may not: then Ray's
    own copies are used, which each node has for as long as the cluster lives, and the copy is there to be put in their
    place (see `check_has_files`).

    Args:
        home: the state directory.
        sweep: whose files they are; where it is never entered in the ledger, they are removed again.

    Raises:
        StateError: they cannot be copied.
    """
    if not is_passing(Path.cwd()):
        yield
        return
    came, copy = Path.cwd(), _copy_of(home, sweep)
    try:
        try:
            copy.parent.mkdir(mode=0o700, exist_ok=True)
            shutil.copytree(came, copy, symlinks=True)
            if not os.environ.get(_CHECKPOINTS):
                os.chdir(copy)
        except OSError as error:
            raise StateError(
                f"the files of a job are kept in the state directory; they cannot be copied to {copy}: "
                f"{error.strerror or error}; mend that, or set {_HOME} on the head"
            ) from error
        yield
    except BaseException:  # a signal or a bug, too, may come before there is a sweep
        with suppress(OSError):
            os.chdir(came)
        with suppress(InputError):  # where the ledger does not say that there is no such sweep, its files are kept
            if not _entered(home, sweep):
                shutil.rmtree(copy, ignore_errors=True)
        raise


def check_has_files(home: Home, reference: str, *, trials: int | None) -> None:
    """Makes sure that a sweep which is to be resumed still has what was sent with it.

    Args:
        home: the state directory.
        reference: the sweep's id, its name, or `last`.
        trials: how many it is to train in all; None for as many as it has.

    Raises:
        StateError: Ray has deleted it.
    """
    with home.ledger() as ledger:
        sweep = ledger.find(reference).id
        record = read_sweep(ledger, sweep)
    gone = next((path for path in _paths_in(record.created.spec) if is_passing(path) and not path.exists()), None)
    if gone is None or (record.state == "finished" and trials is None):
        return
    parts = gone.parts
    place = Path(*parts[: parts.index("working_dir_files") + 2])
    copy = _copy_of(home, sweep)
    way_out = f"copy {copy}, where they are kept, to {place} on every node" if copy.is_dir() else "start it anew"
    raise StateError(
        f"a sweep is resumed with the files that were sent with it; {gone} is gone with the Ray cluster that had it: "
        f"with {_CHECKPOINTS} set, each node had its own; {way_out}; they last where {_HOME} is a directory that all "
        f"nodes share, and {_CHECKPOINTS} is not set"
    )


def _paths_in(value: Any) -> Iterator[Path]:
    """The absolute paths that stand in a spec."""
    match value:
        case str() if value.startswith("/"):
            yield Path(value)
        case dict():
            for inner in value.values():
                yield from _paths_in(inner)
        case list():
            for inner in value:
                yield from _paths_in(inner)


def _copy_of(home: Home, sweep: str) -> Path:
    return home.path / "uploads" / sweep


def _entered(home: Home, sweep: str) -> bool:
    with home.ledger() as ledger:
        return any(one.id == sweep for one in ledger.sweeps())
