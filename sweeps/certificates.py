"""A certificate as a file: what was trained, on what, by which law, and what came of it; JSON that anyone can rerun.

    make    spec, task, classes -> CertificateFile
    check   CertificateFile -> the same runs again, on this machine: does it still hold, and to the last bit?

The file has its own SHA-256, so that an altered one is told from one that no longer holds. JSON has no word for
numbers that are not finite, as runs that diverge have: they are written as "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_core import __version__
from lora_core.files import write_atomically
from lora_core.laws import OptimizerLaw
from lora_core.trajectory import THRESHOLD
from sweeps.certifying import ClassOrder, InFloat64, Told, certify
from sweeps.collapse import Certificate, TwinVerdict
from sweeps.errors import InputError
from sweeps.reduction import Reduction
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.tasks import Task
from sweeps.yaml_text import YamlText

Device = torch.device  # in Environment `torch` is a version

_MOST_BYTES = 2**30
"""A larger file is none that anybody wrote; a device never ends."""

_WORDS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""For the numbers that JSON has not, by Python's names for them."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Environment(_Part):
    """Where it was trained."""

    lora_sweeps: str
    torch: str
    python: str
    platform: str
    device: str
    dtype: str
    """Of the model; adapters of a half-precision model are kept in float32."""
    threads: int
    """That torch used for one operation."""

    @classmethod
    def here(cls, spec: SweepSpec, device: Device) -> Self:
        """This one."""
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        return cls(
            lora_sweeps=__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            platform=platform.platform(terse=True),
            device=f"{device.type} ({name})",
            dtype=spec.train.dtype,
            threads=torch.get_num_threads(),
        )


class Law(_Part):
    """What makes the members of a class one run."""

    optimizer: str
    statement: str
    powers: dict[str, int]
    """A quantity of A becomes itself times a**power, one of B itself times b**power. With one learning rate for both, a
    and b are sqrt(k), where k is the factor on alpha."""

    @classmethod
    def of(cls, law: OptimizerLaw, *, two_parameter: bool) -> Self:
        """As the certificate states it.

        Args:
            law: of the optimizer.
            two_parameter: whether A and B have learning rates of their own.
        """
        decay = {} if law.decay is None else {"weight_decay": law.decay_power}
        powers = {"lr": law.lr_power, "init_scale": -1, "clip_norm": 1, **decay, **law.powers}
        statement = law.describe_two() if two_parameter else law.describe()
        return cls(optimizer=law.name, statement=statement, powers=powers)


class CertificateFile(_Part):
    """Proof, from runs that were really trained, that classes of configurations are one training run each."""

    format: Literal["lora-sweeps certificate"] = "lora-sweeps certificate"
    version: Literal[1] = 1
    made: str
    """When, in UTC (ISO 8601)."""
    environment: Environment
    law: Law
    spec: dict[str, Any]
    """The spec in full: with the code of this version, all that is needed to train the same again."""
    spec_sha256: str
    model_sha256: str
    """Of the frozen base weights."""
    data_sha256: str
    """Of the data as they are trained on."""
    pack: int = Field(ge=1)
    """The most classes that were trained beside each other."""
    threshold: float
    """How many envelopes count as rounding."""
    holds: bool
    """Whether every certificate below holds."""
    certificates: tuple[Certificate, ...] = Field(min_length=1)
    sha256: str = ""
    """Of all the rest, as JSON with sorted keys and no spaces."""

    @model_validator(mode="after")
    def _is_one_piece(self) -> Self:
        if any(not each.twins for each in self.certificates):
            raise ValueError("every class must have a twin")
        if self.steps < 1 or any(each.steps != self.steps for each in self.certificates):
            raise ValueError("the steps of every class must be the same number of at least 1")
        if self.holds != all(each.holds for each in self.certificates):
            raise ValueError("it must hold if every class in it does, and only then")
        if self.spec_sha256 != _sha256_of_json(self.spec):
            raise ValueError("spec_sha256 must be that of its spec")
        return self

    @property
    def steps(self) -> int:
        """Of each run."""
        return self.certificates[0].steps

    @property
    def orders(self) -> list[ClassOrder]:
        """What was trained."""
        return [
            ClassOrder(each.class_id, each.representative, tuple(twin.configuration for twin in each.twins), each.trial)
            for each in self.certificates
        ]

    @classmethod
    def make(
        cls,
        spec: SweepSpec,
        task: Task,
        classes: Sequence[ClassOrder],
        *,
        steps: int,
        pack: int,
        told: Told,
        in_float64: InFloat64 | None = None,
    ) -> Self:
        """Trains classes and records what came of it; the arguments are those of `certify`."""
        made = certify(spec, task, classes, steps=steps, pack=pack, told=told, in_float64=in_float64)
        certificates = tuple(made)
        resolved = spec.model_dump(mode="json")
        file = cls(
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=Environment.here(spec, next(task.model.parameters()).device),
            law=Law.of(spec.train.law, two_parameter=Reduction.of(spec).two_parameter),
            spec=resolved,
            spec_sha256=_sha256_of_json(resolved),
            model_sha256=sha256_of_tensors(task.model.state_dict()),
            data_sha256=sha256_of_tensors(task.data),
            pack=pack,
            threshold=THRESHOLD,
            holds=all(certificate.holds for certificate in certificates),
            certificates=certificates,
        )
        return file.model_copy(update={"sha256": _digest(file._document())})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a certificate.

        Raises:
            InputError: it cannot be read, is no certificate, or was altered.
        """
        required = f"{path}: required a certificate that `lora-sweeps certify` wrote"
        try:
            with path.open("rb") as stream:
                raw = stream.read(_MOST_BYTES + 1)
        except OSError as error:
            raise InputError(f"{required}; found: {error.strerror}") from None
        if len(raw) > _MOST_BYTES:
            raise InputError(f"{required}; found more than {_MOST_BYTES:,} bytes")
        try:
            file = cls.model_validate_json(raw)
        except ValidationError as error:
            raise InputError(f"{required}; found {_first_fault(error)}") from None
        # Of what was written, for an earlier release knew fewer keys.
        if file.sha256 != _digest(json.loads(raw)):
            raise InputError(f"{required}, as it was written; found one that was altered since (its SHA-256 differs)")
        return file

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(self._document(), indent=1, allow_nan=False).encode(), mode=0o644)
        except OSError as error:
            raise _no_place(path, error.strerror) from None

    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = _in_json(self.model_dump(mode="json"))
        return document


def check_place(path: Path) -> None:
    """Refuses a path that no certificate can be written to, before anything is trained for it.

    A certificate that is there may be replaced, and nothing else.

    Raises:
        InputError: it is such a path.
    """
    try:
        if path.is_dir():
            raise _no_place(path, "it is a directory")
        if path.exists():
            _check_replaceable(path)
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise _no_place(path, f"{nearest} is no directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise _no_place(path, f"no permission to write in {nearest}")
    except OSError as error:
        raise _no_place(path, error.strerror) from None


def _check_replaceable(path: Path) -> None:
    try:
        CertificateFile.read(path)
    except InputError:
        raise _no_place(path, "something else than a certificate is there, and would be lost") from None


def _no_place(path: Path, found: str | None) -> InputError:
    return InputError(f"a certificate needs a path that it can be written to; found {path}: {found}; name another")


@dataclass(frozen=True)
class Check:
    """A certificate, and what came of training all of it again.

    Attributes:
        recorded: the certificate.
        rerun: the same made here and now.
        changes: what is not as it was: versions, device, model, data, names, verdicts; empty where all is.
    """

    recorded: CertificateFile
    rerun: CertificateFile
    changes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether it holds now."""
        return self.rerun.holds

    @property
    def reproduced(self) -> bool:
        """Whether every loss and update norm is the recorded one, to the last bit."""
        pairs = zip(self.recorded.certificates, self.rerun.certificates, strict=True)
        return all(_measured(old) == _measured(new) for old, new in pairs)


def check(
    file: CertificateFile,
    task: Task,
    told: Told,
    *,
    most_members: int | None = None,
    in_float64: InFloat64 | None = None,
) -> Check:
    """Trains all of a certificate again.

    Args:
        file: the certificate.
        task: of its spec.
        told: progress.
        most_members: the largest pack that memory holds here, if that is known.
        in_float64: see `certify`.
    """
    spec = spec_of(file)
    reduction = Reduction.of(spec)
    # Names are not taken on trust: they are what the spec makes of the configurations.
    orders = [replace(order, class_id=reduction.class_id(order.representative)) for order in file.orders]
    pack = min(file.pack, most_members or file.pack)
    rerun = CertificateFile.make(spec, task, orders, steps=file.steps, pack=pack, told=told, in_float64=in_float64)
    before, after = (_circumstances(each) for each in (file, rerun))
    changes = tuple(f"{name}: {before[name]} then, {after[name]} now" for name in before if before[name] != after[name])
    return Check(file, rerun, changes)


def spec_of(file: CertificateFile) -> SweepSpec:
    """The spec in a certificate.

    Raises:
        InputError: this version does not know such a spec.
    """
    try:
        return SweepSpec.model_validate(file.spec)
    except ValidationError as error:
        raise InputError(
            f"a certificate of a spec that lora-sweeps {__version__} understands was required; found one of "
            f"{file.environment.lora_sweeps} with {_first_fault(error)}; check it with the version that wrote it"
        ) from None


def document_of(file: CertificateFile, source: str) -> SpecDocument:
    """The spec in a certificate, to be held against its task; see `spec_of`."""
    return SpecDocument(spec_of(file), "", YamlText(source, file.spec, {(): 1}))


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a certificate."""
    schema = CertificateFile.model_json_schema(mode="serialization")
    for name in ("Certificate", "TwinVerdict"):
        schema["$defs"][name] = _with_any_number(schema["$defs"][name])
    words = {"enum": list(_WORDS.values())}
    schema["$defs"]["Number"] = {"description": "A float, finite or not.", "anyOf": [{"type": "number"}, words]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:lora-sweeps:certificate", **schema}


def _with_any_number(schema: Any) -> Any:
    """A schema in which every number may be one that is not finite."""
    if isinstance(schema, list):
        return [_with_any_number(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number":
        return {name: value for name, value in schema.items() if name != "type"} | {"$ref": "#/$defs/Number"}
    return {name: _with_any_number(value) for name, value in schema.items()}


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes, formats and values; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _in_json(value: Any) -> Any:
    """A value of dicts, lists and numbers with words for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _in_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_in_json(each) for each in value]
    return _WORDS[repr(value)] if isinstance(value, float) and not math.isfinite(value) else value


def _digest(document: Mapping[str, Any]) -> str:
    return _sha256_of_json({name: value for name, value in document.items() if name != "sha256"})


def _sha256_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    where, first = ".".join(map(str, faults[0]["loc"])), faults[0]
    if where == "version":
        return f"version {first['input']!r}, which lora-sweeps {__version__} does not know"
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _measured(certificate: Certificate) -> str:
    """All that was measured in training, as text: equal for equal bits, not-a-numbers included."""
    runs: tuple[Certificate | TwinVerdict, ...] = (certificate, *certificate.twins)
    return repr([(run.losses, run.update_norms) for run in runs])


def _circumstances(file: CertificateFile) -> dict[str, str]:
    environment = {name.replace("_", "-"): str(value) for name, value in file.environment.model_dump().items()}
    said = {"law": file.law.statement, "threshold": f"{file.threshold:g}", "pack": str(file.pack)}
    hashes = {"model": file.model_sha256[:12], "data": file.data_sha256[:12]}
    classes: dict[str, str] = {}
    for i, certificate in enumerate(file.certificates, start=1):
        classes[f"name of class {i}"] = certificate.class_id
        for j, twin in enumerate(certificate.twins, start=1):
            classes[f"verdict on twin {j} of class {i}"] = twin.verdict
    return environment | said | hashes | classes
