"""The exceptions of lora-sweeps.

    SweepsError
    └── InputError                what was asked for cannot be done; the message is for the user (exit code 2)
        ├── SpecError             a spec with one or more faults, each with its place
        ├── TaskError             a task's section asks for what the model or the data do not have
        ├── SweepNotFoundError    no sweep goes by that name or id
        ├── StateError            a directory, database or lock that cannot be used
        ├── StorageError          a place for checkpoints that cannot be used
        ├── TrackingError         MLflow cannot be reached or refuses
        └── ClusterError          Ray cannot be started or reached

Every one of them pickles, because Ray carries exceptions between processes.
"""

from __future__ import annotations

from dataclasses import dataclass


class SweepsError(Exception):
    """Root of the tree."""


class InputError(SweepsError, ValueError):
    """What was asked for cannot be done; the message says what was required, what was found, and the way out."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a spec.

    Attributes:
        path: where in the spec, as dotted keys: `parameters.lr.min`.
        required: what must stand there.
        found: what stands there.
        line: line in the file, counted from 1; None where the spec did not come from text.
        hint: the way out, such as the nearest valid name.
    """

    path: str
    required: str
    found: str
    line: int | None = None
    hint: str | None = None

    def render(self, source: str) -> str:
        """`file:line: path: required ...; found ...; hint`."""
        place = source if self.line is None else f"{source}:{self.line}"
        tail = f"; {self.hint}" if self.hint else ""
        return f"{place}: {self.path or 'spec'}: required {self.required}; found {self.found}{tail}"


class SpecError(InputError):
    """A spec with faults: all of them at once.

    Attributes:
        source: the file's name as the user gave it.
        faults: every fault that was found.
    """

    def __init__(self, source: str, faults: tuple[Fault, ...]) -> None:
        super().__init__(source, faults)
        self.source = source
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(fault.render(self.source) for fault in self.faults)


class TaskError(InputError):
    """A task's section asks for what the model or the data do not have: found once they were looked at.

    Attributes:
        path: the key within the section, dotted: `data.train`.
        required: what must stand there.
        found: what was found.
        hint: the way out.
    """

    def __init__(self, path: str, required: str, found: str, hint: str | None = None) -> None:
        super().__init__(path, required, found, hint)
        self.path = path
        self.required = required
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        tail = f"; {self.hint}" if self.hint else ""
        return f"task.{self.path}: required {self.required}; found {self.found}{tail}"


class SweepNotFoundError(InputError):
    """No sweep goes by the name or id that was given."""


class StateError(InputError):
    """A directory, database or lock that lora-sweeps needs cannot be used."""


class StorageError(InputError):
    """The place for checkpoints cannot be reached, written or read."""


class TrackingError(InputError):
    """MLflow cannot be reached, or refuses."""


class ClusterError(InputError):
    """Ray cannot be started, or the cluster at the given address cannot be reached."""
