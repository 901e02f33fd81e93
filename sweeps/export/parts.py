"""What all export formats share: files and their text, what is left to do by hand, and refusals."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.files import write_atomically
from lora_core.gauge import FactorSettings
from sweeps.errors import InputError
from sweeps.export.point import ExportPoint

_WIDTH = 110
_MOST_OFF = 0.01
"""An init scale further from 1 than this is warned of."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What the files cannot say of the run.

    Attributes:
        name: of the setting: `init_scale`.
        value: what it would have to be; None where there is no number.
        warns: whether the run is another one unless somebody acts on it.
        text: one or two sentences for people.
    """

    name: str
    value: float | None
    warns: bool
    text: str


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        files: their paths.
        leftovers: what they cannot say.
        alpha: the alpha in them.
        init_scale: what the adapters must start from for the same run: 1 is the trainer's default.
    """

    files: tuple[Path, ...]
    leftovers: tuple[Leftover, ...]
    alpha: float
    init_scale: float


def save(point: ExportPoint, directory: Path, texts: Mapping[str, str], leftovers: Sequence[Leftover] = ()) -> Exported:
    """Writes files into a directory, which is made where it is missing.

    Raises:
        OSError: the disk refused.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    return Exported(tuple(directory / name for name in texts), tuple(leftovers), point.alpha, point.point.init_scale)


def refusal(trainer: str, required: str, found: str, way_out: str = "--format peft writes it in full") -> InputError:
    """The error for a run that a trainer cannot do: required, found, way out."""
    return InputError(f"a run for {trainer} must have {required}; found {found}: {way_out}")


def torch_group(settings: FactorSettings, *, decays: bool) -> dict[str, Any]:
    """A parameter group in torch.optim's own words.

    Args:
        settings: of the factor.
        decays: whether the optimizer has weight decay.
    """
    decay = {"weight_decay": settings.weight_decay} if decays else {}
    return {"lr": settings.lr, **decay, **settings.constants}


# -- what is left over -------------------------------------------------------------------------------------------------


def leftovers_of(point: ExportPoint, trainer: str) -> list[Leftover]:
    """What no trainer's config can say of a run."""
    found = []
    c = point.point.init_scale
    if c != 1 and point.exact_alpha is not None:
        off = abs(c - 1)
        beyond = off > _MOST_OFF
        act = "multiply every lora_A by that before the first step, or use --format peft" if beyond else "below 1 %"
        found.append(
            Leftover(
                "init_scale",
                c,
                beyond,
                f"alpha {point.exact_alpha:.6g} had to be a whole number for {trainer}; at {point.alpha:g} with lr "
                f"solved anew the init scale would have to be {c:.6g} and is 1, {100 * off:.2g} % off: {act}",
            )
        )
    elif c != 1:
        found.append(
            Leftover(
                "init_scale",
                c,
                True,
                f"at alpha {point.alpha:g} the same run starts from init scale {c!r}, which {trainer} has no key for: "
                "multiply every lora_A by it before the first step, or leave --alpha out",
            )
        )
    if point.spec.lora.dropout:
        found.append(
            Leftover("dropout", None, False, "dropout masks are drawn by the trainer: alike in distribution only")
        )
    if point.point.clip_norm is not None:
        text = "torch's clip_grad_norm_ divides by the norm + 1e-6; the trial was clipped exactly"
        alone = point.point.head is not None or point.point.magnitude is not None
        text += ", and over lora_A and lora_B alone: leave the rest out of it" if alone else ""
        found.append(Leftover("clip_norm", point.point.clip_norm, alone, text))
    if point.point.head is not None:
        text = "a head that the checkpoint does not have is drawn by the trainer: alike in distribution only"
        found.append(Leftover("head", None, False, text))
        if not hasattr(point.spec.task, "head"):
            text = "which modules are the head only the task knows: name them, in PEFT as modules_to_save"
            found.append(Leftover("modules_to_save", None, True, text))
    if point.spec.group_by_length:
        text = (
            "a batch has samples of like length: train_sampling_strategy: group_by_length in transformers 5, "
            "group_by_length: true in transformers 4 and Axolotl"
        )
        found.append(Leftover("group_by_length", None, False, text))
    if point.spec.train.dtype == "bfloat16":
        found.append(
            Leftover(
                "dtype", None, False, f"bfloat16 is rounded at other places by {trainer}: the same run up to rounding"
            )
        )
    return found


# -- text --------------------------------------------------------------------------------------------------------------


def json_text(values: Mapping[str, Any]) -> str:
    """A mapping as JSON."""
    return json.dumps(values, indent=2) + "\n"


def yaml_text(point: ExportPoint, trainer: str, usage: str, values: Mapping[str, Any], left: Sequence[Leftover]) -> str:
    """A config in YAML, below comments that say where it is from, how it is used, and what it cannot say."""
    reached = ", ".join(f"{name} {value:.4g}" for name, value in point.metrics.items())
    about = [
        f"For {trainer}: trial {point.trial} of {point.sweep} (class {point.class_id})"
        + (f", which reached {reached}." if reached else "."),
        "Exact together only: with another alpha, learning rate, weight decay, eps and clip norm move too.",
        usage,
        *(f"{'WARNING' if each.warns else 'Note'}: {each.text}." for each in left),
    ]
    lines = [
        line for text in about for line in textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    ]
    return "\n".join([*lines, *_block(values, "")]) + "\n"


def _block(values: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_block(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    match value:
        case bool() | None:
            return json.dumps(value)
        case float():
            # PyYAML reads 1e-05 as text; 1.0e-05 is a number to everybody.
            mantissa, exponent, power = repr(value).partition("e")
            return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else repr(value)
        case int():
            return str(value)
        case list() | tuple():
            return f"[{', '.join(map(_scalar, value))}]"
    return json.dumps(value)
