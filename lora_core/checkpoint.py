"""A member's state on disk, and adapter folders as PEFT has them. Never a pickle.

A checkpoint directory, in a file system or wherever `Files` are kept:

    <sha256>.safetensors   the tensors, named by their own hash: `adapter/<name>` and `optimizer/<name>`
    manifest.json          step, hash, size and the caller's notes: it names the file that counts

Both are written under a temporary name, synced and renamed, the tensors first. Replacing the manifest is the one
moment at which a new checkpoint takes the place of an old one, and only then is the old tensor file removed: killed
at any moment, the directory holds the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lora_core.files import Files, LocalFiles, write_atomically
from lora_core.targets import ALL_LINEAR

_FORMAT = "lora-sweeps member checkpoint"
_VERSION = 1
_MANIFEST = "manifest.json"
_WAY_OUT = "restore the directory from a copy, or delete it and train the member again from its last rung"


class CheckpointError(ValueError):
    """A checkpoint or adapter folder that cannot be used; the message says what was found and the way out."""


@dataclass(frozen=True)
class MemberState:
    """All that a member needs to go on training.

    Attributes:
        adapter: weights, as `LoraBank.adapter` names them.
        optimizer: as `PackOptimizer.state` names it.
        step: steps done.
        extra: the caller's notes.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    step: int
    extra: dict[str, str]


def save_member(
    directory: Path | Files,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    step: int,
    extra: Mapping[str, str],
) -> None:
    """Writes a member's checkpoint, whole or not at all; one already in the directory is replaced.

    Raises:
        OSError: the disk refused; what was there before is untouched.
    """
    files = _files(directory)
    tensors = {f"adapter/{name}": value for name, value in adapter.items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer.items()}
    data = _serialise(tensors)
    digest = hashlib.sha256(data).hexdigest()
    previous = _previous_digest(files)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "sha256": digest,
        "bytes": len(data),
        "extra": dict(extra),
    }
    files.write(_tensor_file(digest), data)
    files.write(_MANIFEST, json.dumps(manifest, indent=2).encode())
    if previous is not None and previous != digest:
        files.remove(_tensor_file(previous))


def load_member(directory: Path | Files) -> MemberState:
    """Reads a member's checkpoint, onto the CPU, after checking its hash.

    Raises:
        CheckpointError: there is none, or it is truncated, altered or of another version.
        OSError: the disk refused.
    """
    files = _files(directory)
    manifest = _read_manifest(files)
    name = _tensor_file(manifest["sha256"])
    try:
        data = files.read(name)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {files} has lost its tensor file {name}; {_WAY_OUT}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest["sha256"]:
        expected = f"{manifest['bytes']} bytes with SHA-256 {manifest['sha256']}"
        found = f"{len(data)} bytes with {digest}"
        raise CheckpointError(f"checkpoint {files}/{name} must have {expected}; found {found}; {_WAY_OUT}")
    adapter: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for key, value in safetensors.torch.load(data).items():
        kind, _, name = key.partition("/")
        {"adapter": adapter, "optimizer": optimizer}[kind][name] = value
    return MemberState(adapter, optimizer, manifest["step"], manifest["extra"])


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    # Clones: safetensors refuses tensors that share a storage, which is just what a bank's views do.
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    data: bytes = safetensors.torch.save(copies)
    return data


def _files(directory: Path | Files) -> Files:
    return LocalFiles(directory) if isinstance(directory, Path) else directory


def _tensor_file(digest: str) -> str:
    return f"{digest}.safetensors"


def _previous_digest(files: Files) -> str | None:
    try:
        return str(_read_manifest(files)["sha256"])
    except CheckpointError:
        return None


def _read_manifest(files: Files) -> dict[str, Any]:
    path = f"{files}/{_MANIFEST}"
    try:
        manifest: Any = json.loads(files.read(_MANIFEST))
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint in {files}: it has no {_MANIFEST}; {_WAY_OUT}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {_WAY_OUT}") from None
    fields: dict[str, Any] = manifest if isinstance(manifest, dict) else {}
    form = fields.get("format"), fields.get("version")
    if form != (_FORMAT, _VERSION):
        raise CheckpointError(f"{path} must be {(_FORMAT, _VERSION)}; found {form}: use the release that wrote it")
    kinds = {"step": int, "bytes": int, "extra": dict, "sha256": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(fields.get(key), kind)]
    # The digest becomes a file name, so nothing but a digest may pass.
    if wrong or not re.fullmatch("[0-9a-f]{64}", fields["sha256"]):
        raise CheckpointError(f"{path} has a wrong {', '.join(wrong) or 'sha256'}; {_WAY_OUT}")
    return fields


# -- adapter folders as PEFT has them ----------------------------------------------------------------------------------

_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_PEFT_MAGNITUDE = "lora_magnitude_vector"
_BARE = ("lora_embedding_A", "lora_embedding_B")
"""Factors that PEFT keeps as parameters of the layer, so that their names have no `.weight`; nor have magnitudes."""

_NOT_PLAIN = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
)
"""Settings of PEFT's with which an adapter is more, or something else, than LoRA of one rank and alpha."""

_OTHER_BASE = ("corda", "lora_ga", "loftq", "olora", "pissa")
"""Inits that change the base weights; what PEFT saves of them belongs to that changed model."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter folder's content, its tensors named and shaped as `LoraBank.adapter` does."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool
    dropout: float = 0.0

    @property
    def use_dora(self) -> bool:
        """Whether it has magnitudes."""
        return _has_magnitudes(self.tensors)


def split_saved_modules(
    tensors: Mapping[str, Tensor], heads: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tells the tensors of an adapter from those of its heads (`LoraBank.heads`).

    Returns:
        The adapter, and PEFT's `modules_to_save`: the state of each head by its full name.
    """
    saved = {
        head: {name.removeprefix(f"{head}."): value for name, value in tensors.items() if name.startswith(f"{head}.")}
        for head in heads
    }
    own = {f"{head}.{name}" for head, state in saved.items() for name in state}
    return {name: value for name, value in tensors.items() if name not in own}, saved


def export_peft_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    use_rslora: bool,
    dropout: float = 0.0,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    saved_modules: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes an adapter folder that `peft.PeftModel.from_pretrained` loads: DoRA where the tensors have magnitudes.

    Args:
        directory: made if it is not there.
        tensors: as `LoraBank.adapter` returns them: `fc1.lora_A` [r, I], `fc1.lora_B` [r, O], `fc1.magnitude`
            [1, O], `wte.lora_embedding_A` and `wte.lora_embedding_B`.
        rank: r.
        alpha: in the gauge that the tensors are in.
        target_modules: as the spec has them. `all-linear` is written as the layers that it stood for, as PEFT does it:
            what it stands for depends on the model's class, which the folder does not know.
        use_rslora: whether alpha is divided by sqrt(r) instead of r.
        dropout: that it was trained with, for whoever trains it on; it changes no output.
        base_model: name or path that PEFT should load the base model from, if it has one.
        revision: branch, tag or commit of a base model on the hub.
        task_type: PEFT's: CAUSAL_LM, SEQ_CLS and so on. With SEQ_CLS the classifier's head gets no adapter, whatever
            the target modules match, and PEFT looks for it among the saved modules.
        fan_in_fan_out: whether the layers are Conv1D (`LoraBank.fan_in_fan_out`).
        saved_modules: PEFT's `modules_to_save`: the state of each module that was trained whole, by its full name.
    """
    saved_modules = saved_modules or {}
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        target_modules = sorted({name.rpartition(".")[0] for name in tensors})
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": use_rslora,
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "init_lora_weights": True,
        "use_dora": _has_magnitudes(tensors),
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    weights = dict(_to_peft(name, value) for name, value in tensors.items())
    if saved_modules:
        config["modules_to_save"] = sorted(saved_modules)
        states = {name: state.items() for name, state in saved_modules.items()}
        weights |= {f"{_PEFT_PREFIX}{name}.{key}": value for name, items in states.items() for key, value in items}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / _PEFT_WEIGHTS, _serialise(weights))
    write_atomically(directory / _PEFT_CONFIG, json.dumps(config, indent=2).encode())


def import_peft_adapter(directory: Path) -> PeftAdapter:
    """Reads a LoRA or DoRA adapter folder as PEFT writes it.

    Raises:
        CheckpointError: a file is missing or broken, or the adapter is more than LoRA or DoRA of one rank (biases,
            per-layer ranks, other trained modules, a base model changed by its init), or has not what its config says.
    """
    try:
        config = json.loads((directory / _PEFT_CONFIG).read_bytes())
        weights = safetensors.torch.load((directory / _PEFT_WEIGHTS).read_bytes())
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise CheckpointError(f"{directory} has no {missing}: save the adapter with safe_serialization=True") from None
    except (ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the adapter in {directory} cannot be read ({error}): save it again") from None
    beyond = [key for key in _NOT_PLAIN if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(_OTHER_BASE):
        beyond.append(f"init_lora_weights={config['init_lora_weights']!r}, which changes the base model,")
    if config.get("peft_type") != "LORA" or beyond:
        found = ", ".join(beyond) or config.get("peft_type")
        raise CheckpointError(
            f"{directory} must hold LoRA or DoRA of one rank and alpha, for that is what a member of a pack has; found "
            f"{found} in {_PEFT_CONFIG}: merge it into its base model with PEFT's merge_and_unload, and adapt that one"
        )
    factors = ("lora_A", "lora_B", "magnitude") if config.get("use_dora") else ("lora_A", "lora_B")
    tensors = dict(_from_peft(directory, name, value, factors) for name, value in weights.items())
    if absent := sorted({needed for name in tensors for needed in _beside(name, factors)} - tensors.keys()):
        raise CheckpointError(
            f"{directory} must hold {', '.join(factors)} of every layer; found no {', '.join(absent)}: save it again"
        )
    targets = config["target_modules"]
    return PeftAdapter(
        tensors,
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=bool(config.get("use_rslora", False)),
        dropout=float(config.get("lora_dropout", 0.0)),
    )


def _has_magnitudes(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(".magnitude") for name in tensors)


def _beside(name: str, factors: Sequence[str]) -> Sequence[str]:
    """What a layer has of which one tensor is found."""
    layer, _, factor = name.rpartition(".")
    return [f"{layer}.{each}" for each in (_BARE if factor in _BARE else factors)]


def _to_peft(name: str, value: Tensor) -> tuple[str, Tensor]:
    """A tensor of `LoraBank.adapter` as PEFT names and shapes it: B [O, r], magnitudes [O]."""
    layer, _, factor = name.rpartition(".")
    if factor == "magnitude":
        return f"{_PEFT_PREFIX}{layer}.{_PEFT_MAGNITUDE}", value[0]
    ending = "" if factor in _BARE else ".weight"
    return f"{_PEFT_PREFIX}{layer}.{factor}{ending}", value.mT if factor.endswith("_B") else value


def _from_peft(directory: Path, name: str, value: Tensor, factors: Sequence[str]) -> tuple[str, Tensor]:
    """The way back, for a tensor that must be one of `factors` or of an embedding's."""
    if name.endswith(".base_layer.weight"):  # what PEFT adds for an adapted embedding
        raise CheckpointError(
            f"{directory} must hold an adapter without weights of its base model; found {name!r}: save it with "
            "save_embedding_layers=False, if the vocabulary is the base model's own"
        )
    layer, _, factor = name.removeprefix(_PEFT_PREFIX).removesuffix(".weight").rpartition(".")
    factor = "magnitude" if factor == _PEFT_MAGNITUDE else factor
    if factor not in (*factors, *_BARE) or value.dim() != (1 if factor == "magnitude" else 2):
        kinds = "lora_A and lora_B matrices" + (f" and {_PEFT_MAGNITUDE}s" if "magnitude" in factors else "")
        raise CheckpointError(f"{directory} must hold nothing but {kinds}; found {name!r}")
    if factor == "magnitude":
        return f"{layer}.magnitude", value[None].contiguous()
    return f"{layer}.{factor}", (value.mT if factor.endswith("_B") else value).contiguous()
