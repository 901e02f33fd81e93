"""A certificate as a file: what was trained, on what, by which law, and what came of it; JSON that anyone can rerun.

    make    spec, task, classes -> CertificateFile
    check   CertificateFile -> the same runs again, on this machine: does it still hold, and to the last bit?

The file has its own SHA-256, so that an altered one is told from one that no longer holds.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lora_core import __version__
from lora_core.checkpoint import write_atomically
from lora_core.laws import OptimizerLaw
from lora_core.trajectory import THRESHOLD
from sweeps.certifying import ClassOrder, Told, certify
from sweeps.collapse import Certificate
from sweeps.errors import InputError
from sweeps.spec import SweepSpec
from sweeps.tasks import Task

Device = torch.device


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True)


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
    """What alpha x k does, with one learning rate for A and B: a quantity becomes itself times sqrt(k)**power."""

    @classmethod
    def of(cls, law: OptimizerLaw) -> Self:
        """As the certificate states it."""
        decay = {} if law.decay is None else {"weight_decay": law.decay_power}
        powers = {"lr": law.lr_power, "init_scale": -1, "clip_norm": 1, **decay, **law.powers}
        return cls(optimizer=law.name, statement=law.describe(), powers=powers)


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
    pack: int
    """The most classes that were trained beside each other."""
    threshold: float
    """How many envelopes count as rounding."""
    holds: bool
    """Whether every certificate below holds."""
    certificates: tuple[Certificate, ...]
    sha256: str = ""
    """Of all the rest, as JSON with sorted keys and no spaces."""

    @classmethod
    def make(
        cls, spec: SweepSpec, task: Task, classes: Sequence[ClassOrder], *, steps: int, pack: int, told: Told
    ) -> Self:
        """Trains classes and records what came of it."""
        certificates = tuple(certify(spec, task, classes, steps=steps, pack=pack, told=told))
        resolved = spec.model_dump(mode="json")
        file = cls(
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=Environment.here(spec, next(task.model.parameters()).device),
            law=Law.of(spec.train.law),
            spec=resolved,
            spec_sha256=_sha256_of_json(resolved),
            model_sha256=sha256_of_tensors(task.model.state_dict()),
            data_sha256=sha256_of_tensors(task.data),
            pack=pack,
            threshold=THRESHOLD,
            holds=all(certificate.holds for certificate in certificates),
            certificates=certificates,
        )
        return file.model_copy(update={"sha256": file._digest()})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a certificate.

        Raises:
            InputError: it cannot be read, is no certificate, or was altered.
        """
        required = f"{path}: required a certificate that `lora-sweeps certify` wrote"
        try:
            file = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{required}; found: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            more = f" and {error.error_count() - 1} more faults" if error.error_count() > 1 else ""
            raise InputError(f"{required}; found, at {where}: {first['msg']}{more}") from None
        if file.sha256 != file._digest():
            raise InputError(f"{required}, as it was written; found one that was altered since (its SHA-256 differs)")
        return file

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.model_dump_json(indent=1).encode())
        except OSError as error:
            raise InputError(f"a certificate needs a path that can be written; {path}: {error.strerror}") from None

    def _digest(self) -> str:
        return _sha256_of_json(self.model_dump(mode="json", exclude={"sha256"}))


@dataclass(frozen=True)
class Check:
    """A certificate, and what came of training all of it again.

    Attributes:
        recorded: the certificate.
        rerun: the same made here and now.
        changes: what is not as it was: versions, device, model, data; empty where all is.
    """

    recorded: CertificateFile
    rerun: CertificateFile
    changes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether it (still) holds."""
        return self.rerun.holds

    @property
    def reproduced(self) -> bool:
        """Whether every loss and update norm is the recorded one, to the last bit."""
        return all(
            _numbers(old) == _numbers(new)
            for old, new in zip(self.recorded.certificates, self.rerun.certificates, strict=True)
        )


def check(file: CertificateFile, task: Task, told: Told) -> Check:
    """Trains all of a certificate again."""
    classes = [
        ClassOrder(each.class_id, each.representative, tuple(twin.configuration for twin in each.twins), each.trial)
        for each in file.certificates
    ]
    steps = file.certificates[0].steps if file.certificates else 0
    rerun = CertificateFile.make(spec_of(file), task, classes, steps=steps, pack=file.pack, told=told)
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
    except ValidationError:
        written = file.environment.lora_sweeps
        raise InputError(
            f"a certificate of a spec that lora-sweeps {__version__} understands was required; found one of {written}: "
            "check it with that version"
        ) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a certificate."""
    schema = CertificateFile.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:lora-sweeps:certificate", **schema}


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes, formats and values; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _numbers(certificate: Certificate) -> str:
    """All that was measured in training, as text: equal for equal bits, not-a-numbers included."""
    runs: Iterable[Any] = (certificate, *certificate.twins)
    return repr([(run.losses, run.update_norms) for run in runs])


def _circumstances(file: CertificateFile) -> dict[str, str]:
    environment = {name.replace("_", "-"): str(value) for name, value in file.environment.model_dump().items()}
    return environment | {"model": file.model_sha256[:12], "data": file.data_sha256[:12]}
