"""YAML -> SweepSpec: what a sweep is, as its user wrote it, or every fault of it at once.

    text -> YamlText (yaml_text.py) -> SweepSpec (sections below it) -> SpecDocument, which knows the lines

A section is checked on its own in `spec_sections.py`, `spec_tasks.py` and `spec_parameters.py`. What one section
demands of another is checked here, in validators of the later one, which see those earlier sections that were read: so
a fault in one section hides none in another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from lora_core.presets import PRESETS, WITHOUT_ADAPTER
from sweeps.errors import Fault, InputError, SpecError
from sweeps.spec_faults import Mistake, Section, did_you_mean, mistakes_of, one_of, refusal, refuse
from sweeps.spec_parameters import Choice, Parameters, Range
from sweeps.spec_preset import FILLED, filled
from sweeps.spec_sections import (
    CertifySpec,
    ComputeSpec,
    Goal,
    LoraSpec,
    MedianPruner,
    MetricSpec,
    NoPruner,
    Pruner,
    ReductionSpec,
    SearchSpec,
    SuccessiveHalving,
    TrackingSpec,
    TrainSpec,
)
from sweeps.spec_tasks import (
    CausalLmTask,
    DigitsTask,
    InDirectory,
    ModelTask,
    PythonTask,
    SequenceClassificationTask,
    Task,
    Whereabouts,
    context_of,
)
from sweeps.yaml_text import MAX_BYTES, YamlText, dotted, read_yaml

__all__ = [
    "CausalLmTask",
    "CertifySpec",
    "Choice",
    "ComputeSpec",
    "DigitsTask",
    "Goal",
    "LoraSpec",
    "MedianPruner",
    "MetricSpec",
    "NoPruner",
    "Parameters",
    "Pruner",
    "PythonTask",
    "Range",
    "ReductionSpec",
    "SearchSpec",
    "SequenceClassificationTask",
    "SpecDocument",
    "SuccessiveHalving",
    "SweepSpec",
    "Task",
    "TrackingSpec",
    "TrainSpec",
    "json_schema",
    "load_spec",
    "parse_spec",
    "spec_of",
    "template",
]

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class SweepSpec(Section):
    """A hyperparameter sweep over LoRA adapters."""

    name: str = Field(examples=["my-sweep"], json_schema_extra={"pattern": _NAME})
    """The sweep's name: 1 to 64 letters, digits, dots, dashes and underscores."""
    task: Task = Field(examples=[{"type": "digits"}])
    """What is trained."""
    preset: str | None = Field(None, json_schema_extra={"enum": [*PRESETS, None]})
    """A recipe of microsoft/LoRA (gpt2-nlg, gpt2-nlg-readme, roberta-base-nlu, deberta-xxl-nlu) for what is unwritten:
    parameters.rank, alpha, lr and weight_decay; lora.target_modules and dropout; train.optimizer, betas, eps, clip_norm
    and schedule. What is written wins. Steps, batch size and warm-up are not the recipe's but the spec's own. With a
    preset lora and parameters may be left out, although the schema, which does not know this, requires them."""
    lora: LoraSpec = Field(examples=[{"target_modules": ["q_proj", "v_proj"]}])
    """Where the adapters sit, and how they start."""
    parameters: Parameters = Field(examples=[{"rank": 8, "lr": {"min": 0.0001, "max": 0.1}}])
    """What is searched."""
    reduction: ReductionSpec = ReductionSpec()
    """How alpha is eliminated."""
    train: TrainSpec = Field(TrainSpec(), validate_default=True)
    """How every trial is trained."""
    metric: MetricSpec = Field(MetricSpec(), validate_default=True)
    """What makes one trial better than another."""
    search: SearchSpec = Field(SearchSpec(), validate_default=True)
    """How configurations are chosen."""
    certify: CertifySpec = Field(CertifySpec(), validate_default=True)
    """How much of the reduction is proved by training twins."""
    compute: ComputeSpec = ComputeSpec()
    """What the sweep may use."""
    tracking: TrackingSpec = TrackingSpec()
    """Where the sweep is recorded."""

    @property
    def group_by_length(self) -> bool:
        """Whether a batch has rows of like length; tasks whose rows are of one length have no such key."""
        return bool(getattr(self.task, "group_by_length", False))

    @property
    def torch_compile(self) -> bool:
        """Whether the model is compiled; tasks without a model of transformers have no such key."""
        return bool(getattr(self.task, "torch_compile", False))

    @model_validator(mode="before")
    @classmethod
    def _with_its_preset(cls, raw: Any) -> Any:
        return filled(raw)

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(_NAME, name):
            required = "1 to 64 of A-Z, a-z, 0-9, dot, dash and underscore, with a letter or digit first"
            raise refuse(required, name)
        return name

    @field_validator("preset")
    @classmethod
    def _is_a_preset(cls, preset: str | None) -> str | None:
        if preset in WITHOUT_ADAPTER:
            raise refuse(f"a recipe with an adapter ({', '.join(PRESETS)})", preset, WITHOUT_ADAPTER[preset])
        if preset is not None and preset not in PRESETS:
            raise refuse(one_of(PRESETS), preset, did_you_mean(preset, PRESETS))
        return preset

    @field_validator("train")
    @classmethod
    def _fits_what_is_trained(cls, train: TrainSpec, read: ValidationInfo) -> TrainSpec:
        mistakes: list[Mistake] = []
        if "lora" in read.data:
            mistakes += _magnitude_mistakes(train, read.data["lora"])
        if "parameters" in read.data and "task" in read.data:
            mistakes += _head_mistakes(train, read.data["parameters"], read.data["task"])
        if "parameters" in read.data and train.law.decay is None:
            decay: Choice | Range = read.data["parameters"].weight_decay
            if isinstance(decay, Range) or any(decay.values):
                path, found = ("parameters", "weight_decay"), _as_written(decay)
                mistakes.append(Mistake(path, f"0, for {train.optimizer} has no weight decay", found, absolute=True))
        if mistakes:
            raise refusal(mistakes)
        return train

    @field_validator("metric")
    @classmethod
    def _is_reported(cls, metric: MetricSpec, read: ValidationInfo) -> MetricSpec:
        if "task" in read.data and metric.name not in (reported := read.data["task"].metrics):
            hint = did_you_mean(metric.name, reported)
            raise refuse(f"{one_of(reported)}, which the task reports", metric.name, hint, path=("name",))
        if "task" in read.data and "goal" not in metric.model_fields_set:
            return metric.model_copy(update={"goal": reported[metric.name]})
        return metric

    @field_validator("search")
    @classmethod
    def _fits_the_rest(cls, search: SearchSpec, read: ValidationInfo) -> SearchSpec:
        mistakes: list[Mistake] = []
        if "train" in read.data:
            mistakes += _rung_mistakes(search, read.data["train"])
        if "parameters" in read.data:
            mistakes += _method_mistakes(search, read.data["parameters"])
        if mistakes:
            raise refusal(mistakes)
        return search

    @field_validator("compute")
    @classmethod
    def _has_gpus_for_its_task(cls, compute: ComputeSpec, read: ValidationInfo) -> ComputeSpec:
        if "task" in read.data and (mistakes := _gpu_mistakes(compute, read.data["task"])):
            raise refusal(mistakes)
        return compute

    @field_validator("certify")
    @classmethod
    def _ends_with_training(cls, certify: CertifySpec, read: ValidationInfo) -> CertifySpec:
        if "train" not in read.data or certify.steps <= (steps := read.data["train"].steps):
            return certify
        if "steps" in certify.model_fields_set:
            raise refuse(f"at most train.steps, which is {steps}", certify.steps, path=("steps",))
        # A default is no fault of the user's.
        return certify.model_copy(update={"steps": steps})


def _as_written(parameter: Choice | Range) -> str:
    if isinstance(parameter, Range):
        return f"{{min: {parameter.min:g}, max: {parameter.max:g}}}"
    return f"{parameter.values[0]:g}" if parameter.constant else f"{{values: {list(parameter.values)}}}"


def _gpu_mistakes(compute: ComputeSpec, task: Task) -> list[Mistake]:
    """What does not go with several GPUs a worker, over which a model is spread layer by layer."""
    gpus = compute.gpus_per_worker
    if gpus == "auto" or gpus <= 1:
        return []
    if not isinstance(task, ModelTask):
        required = f"at most 1, for the model of a {task.type} task is not spread over several GPUs"
        way_out = "the others would be idle: leave it out, and each GPU has a worker of its own"
        return [Mistake(("gpus_per_worker",), required, f"{gpus:g}", way_out)]
    if task.torch_compile:
        required = "false with several GPUs a worker, for a graph breaks wherever activations may change GPUs"
        way_out = "set it to false, or compute.gpus_per_worker to 1"
        return [Mistake(("task", "torch_compile"), required, "true", way_out, absolute=True)]
    return []


def _magnitude_mistakes(train: TrainSpec, lora: LoraSpec) -> list[Mistake]:
    path = ("magnitude_lr",)
    if not lora.dora:
        if train.magnitude_lr is None:
            return []
        return [Mistake(path, "none, for lora.dora is false", str(train.magnitude_lr), "remove it, or set lora.dora")]
    if train.law.matrices:
        required = f"false, for {train.optimizer} takes matrices only"
        return [Mistake(("lora", "dora"), required, "true", "DoRA's magnitudes are vectors", absolute=True)]
    if train.magnitude_lr is None:
        required = "a learning rate, for lora.dora is true and no gauge moves its magnitudes"
        return [Mistake(path, required, "nothing", "such as 0.001")]
    return []


def _head_mistakes(train: TrainSpec, parameters: Parameters, task: Task) -> list[Mistake]:
    head_lr: Choice | Range = parameters.head_lr
    path, none = ("parameters", "head_lr"), isinstance(head_lr, Choice) and head_lr.values == (0.0,)
    if not none and task.trains_head is False:
        required = f"none, for {task.type} trains no head"
        return [Mistake(path, required, _as_written(head_lr), "remove it", absolute=True)]
    if none and task.trains_head:
        required = "a learning rate for the head, which alpha does not move and which must be its own"
        return [Mistake(path, required, "none", "such as {min: 1e-4, max: 1e-2}", absolute=True)]
    if none:
        return []
    if isinstance(head_lr, Choice) and 0 in head_lr.values:
        return [Mistake(path, "learning rates above 0", _as_written(head_lr), absolute=True)]
    if train.law.matrices:
        required = f"none, for {train.optimizer} takes matrices only"
        return [
            Mistake(path, required, _as_written(head_lr), "a head has vectors: use another optimizer", absolute=True)
        ]
    return []


def _rung_mistakes(search: SearchSpec, train: TrainSpec) -> list[Mistake]:
    rungs = search.pruner.rungs
    if rungs is None or rungs[-1] == train.steps:
        return []
    path = ("pruner", "rungs", len(rungs) - 1)
    return [Mistake(path, f"train.steps, which is {train.steps}, as the last rung", str(rungs[-1]))]


def _method_mistakes(search: SearchSpec, parameters: Parameters) -> list[Mistake]:
    written: dict[str, Choice | Range] = dict(parameters)
    if search.method == "grid":
        hint = "write {values: [...]}, or use another search.method"
        ranges = [name for name, parameter in written.items() if isinstance(parameter, Range)]
        return [
            Mistake(("parameters", name), "values, because search.method is grid", "a range", hint, absolute=True)
            for name in ranges
        ]
    searched = _searched(written)
    if search.method == "cmaes" and len(searched) < 2:
        found = f"{len(searched)} ({', '.join(searched)})" if searched else "none"
        return [Mistake(("method",), "two searched parameters or more for cmaes", found, "use gp or tpe")]
    return []


def _searched(written: Mapping[str, Choice | Range]) -> list[str]:
    # alpha is eliminated; it leaves a dimension only where it was an init scale under another name.
    return [
        name
        for name, parameter in written.items()
        if not parameter.constant and (name != "alpha" or written["init_scale"].constant)
    ]


@dataclass(frozen=True, slots=True)
class SpecDocument:
    """A spec, and the text that it was read from.

    Attributes:
        spec: the spec.
        text: the YAML text as the user wrote it, comments and all.
        yaml: the values of the text with their lines.
    """

    spec: SweepSpec
    text: str
    yaml: YamlText

    @property
    def source(self) -> str:
        """The file's name as the user gave it."""
        return self.yaml.source

    def fault(self, path: str, required: str, found: str, hint: str | None = None) -> Fault:
        """Returns a fault that a later stage found, with its line; that of the preset, where it comes from there.

        Args:
            path: dotted keys, list entries by index: `parameters.rank.values[3]`.
            required: what must stand there.
            found: what stands there.
            hint: the way out.
        """
        parts = tuple(int(index) if index else key for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path))
        from_preset = self.spec.preset is not None and parts[:2] in FILLED and parts[:2] not in self.yaml.lines
        return Fault(path, required, found, self.yaml.line_of(("preset",) if from_preset else parts), hint)

    def error(self, path: str, required: str, found: str, hint: str | None = None) -> SpecError:
        """Returns the error for a single fault; see `fault`."""
        return SpecError(self.source, (self.fault(path, required, found, hint),))


def parse_spec(text: str, source: str) -> SpecDocument:
    """Reads a spec.

    Args:
        text: YAML text; not trusted.
        source: the file's name as the user gave it, for messages; relative paths in the spec start from its directory.

    Raises:
        SpecError: the text is no plain YAML, or no spec; every fault at once, in the order of the lines.
    """
    return spec_of(text, read_yaml(text, source), InDirectory(Path(source).parent.absolute()))


def spec_of(text: str, yaml: YamlText, whereabouts: Whereabouts, refused: Iterable[Mistake] = ()) -> SpecDocument:
    """Makes a spec of a text that was read.

    Args:
        text: the YAML text as the user wrote it.
        yaml: its values.
        whereabouts: what the places in it mean.
        refused: what is wrong with it beside, told together with the rest, and in place of what else is wrong there.

    Raises:
        SpecError: it is no spec, or something in it is refused; every fault at once, in the order of the lines.
    """
    mistakes = list(refused)
    try:
        spec = SweepSpec.model_validate(yaml.value, context=context_of(whereabouts))
    except ValidationError as error:
        told = {mistake.path for mistake in mistakes}
        mistakes += [mistake for mistake in mistakes_of(error) if mistake.path not in told]
    if mistakes:
        raise SpecError(yaml.source, _faults(mistakes, yaml))
    return SpecDocument(spec, text, yaml)


def _faults(mistakes: list[Mistake], yaml: YamlText) -> tuple[Fault, ...]:
    faults = [Fault(dotted(one.path), one.required, one.found, yaml.line_of(one.path), one.hint) for one in mistakes]
    return tuple(sorted(faults, key=lambda fault: fault.line or 0))


def load_spec(path: Path) -> SpecDocument:
    """Reads a spec from a file.

    Raises:
        InputError: there is no such file, or it is not UTF-8 text that can be read.
        SpecError: it holds no spec; see `parse_spec`.
    """
    return parse_spec(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Reads the text of a spec's file, for whoever does not look into it.

    Raises:
        InputError: there is no such file, or it is not UTF-8 text that can be read.
    """
    try:
        with path.open("rb") as file:
            # One byte more than allowed, so that an endless device is refused for its size too.
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(
            f"{path}: required a spec; found no such file; `lora-sweeps init` writes one to start from"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path}: required a spec; found a directory; name the YAML file inside it") from None
    except (OSError, ValueError) as error:
        # ValueError: a path with a null byte.
        found = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: required a spec that can be read; found: {found}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: required a spec of at most {MAX_BYTES:,} bytes; found a larger file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"the byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(f"{path}: required UTF-8 text; found {byte}; save the file as UTF-8") from None


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a spec, by which editors complete and check it.

    It accepts the same shorthand as `parse_spec`, but cannot state what one section demands of another.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:lora-sweeps:spec",
        **SweepSpec.model_json_schema(),
        "title": "lora-sweeps spec",
    }


def template() -> str:
    """Returns the commented spec that `lora-sweeps init` writes: every section, ready to run."""
    return resources.files("sweeps").joinpath("template.yaml").read_text("utf-8")
