"""The sections of a spec, but for its parameters. What one section demands of another is checked in `spec.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from lora_core.laws import LAWS, WITHOUT_LAW, Absolute, Constant, NoLawError, OptimizerLaw, Option, law_of
from sweeps.secrecy import has_secret
from sweeps.spec_faults import ByType, Mistake, Section, did_you_mean, one_of, refusal, refuse
from sweeps.yaml_text import shown

Goal = Literal["minimize", "maximize"]

Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
Flag = Annotated[bool, Strict()]
Dtype = Literal["float32", "float64", "bfloat16", "auto"]
Positive = Annotated[float, Strict(), Field(gt=0)]
BelowOne = Annotated[float, Strict(), Field(ge=0, lt=1)]


def in_one(required: str) -> WrapValidator:
    """Returns a validator that states one requirement for all the types of a union, instead of one for each."""

    def read(raw: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(raw)
        except ValidationError:
            raise refuse(required, raw) from None

    return WrapValidator(read)


# -- how it is trained -------------------------------------------------------------------------------------------------


_Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
_Regex = Annotated[str, Field(min_length=1, max_length=1000)]


def _read_target_modules(raw: object) -> tuple[str, ...] | str:
    required = "a list of module names, or one regular expression"
    if isinstance(raw, str) and 0 < len(raw) <= 1000:
        try:
            re.compile(raw)
        except (re.error, OverflowError, RecursionError) as error:
            raise refuse("a regular expression that compiles", raw, str(error)) from None
        return raw
    if not isinstance(raw, list | tuple) or not raw:
        raise refuse(required, raw, "such as [q_proj, v_proj]")
    wrong = [(index, name) for index, name in enumerate(raw) if not isinstance(name, str) or not name]
    if wrong:
        raise refusal(Mistake((index,), "a module name", shown(name)) for index, name in wrong)
    return tuple(raw)


class LoraSpec(Section):
    """Where the adapters sit, and how they start."""

    # Read before pydantic does, which would find a fault for each arm of the union.
    target_modules: Annotated[_Names | _Regex, BeforeValidator(_read_target_modules)] = Field(
        examples=[["q_proj", "v_proj"]]
    )
    """Names of the layers that get an adapter, one regular expression that their full names match, or all-linear: every
    linear layer but the output. As in PEFT."""
    init: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"
    """Distribution that A is drawn from; B starts at 0. kaiming_uniform is PEFT's default."""
    rslora: Flag = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dropout: BelowOne = 0.0
    """Probability with which an element of an adapter's input is dropped in training."""
    dora: Flag = False
    """Train a magnitude for every output of a layer beside A and B (DoRA); needs train.magnitude_lr."""


class ReductionSpec(Section):
    """How alpha is eliminated."""

    ranges: Literal["keep", "widen"] = "keep"
    """keep: the ranges of lr and init_scale stand at the reference alpha. widen: alpha's range is folded into them."""
    constants: Literal["travel", "fixed"] = "travel"
    """travel: eps, weight_decay and clip_norm hold at the reference alpha and move with alpha by the law. fixed: they
    are the same numbers at every alpha, and fewer configurations are twins."""


def _read_betas(raw: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    if raw is not None and (not isinstance(raw, list | tuple) or len(raw) != 2):
        raise refuse("two numbers", raw, "such as [0.9, 0.999]")
    return validate(raw)


def _read_options(raw: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(raw, dict):
        raise refuse("keys and values", raw, "such as {nesterov: true}, or leave it out")
    return validate(raw)


class TrainSpec(Section):
    """How every trial is trained."""

    optimizer: str = Field("adamw", json_schema_extra={"enum": list(LAWS)})
    """The optimizer; the law that eliminates alpha depends on it."""
    steps: Count = 200
    """Optimizer steps of a trial that runs to the end."""
    batch_size: Count = 32
    """Examples a step."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up: not, linearly to 0, or along a half cosine to 0."""
    warmup_steps: CountOrZero = 0
    """Steps in which the learning rate rises linearly to its peak."""
    accumulation: Count = 1
    """Batches whose gradients are averaged for one step."""
    eps: Positive | None = None
    """eps at the reference alpha, for optimizers that have one; null: the optimizer's default, 1e-8 for AdamW."""
    betas: Annotated[tuple[BelowOne, BelowOne] | None, WrapValidator(_read_betas)] = None
    """The two decay rates of Adam and its kin; null: the optimizer's default, [0.9, 0.999]."""
    momentum: BelowOne | None = None
    """Momentum, for optimizers that have one; null: the optimizer's default, 0 for SGD."""
    options: Annotated[dict[str, Any], WrapValidator(_read_options)] = Field(default_factory=dict)
    """More settings of the optimizer under torch.optim's names, such as {nesterov: true} or {amsgrad: true}."""
    magnitude_lr: Positive | None = None
    """Learning rate of DoRA's magnitudes, which alpha does not move; required with lora.dora."""
    clip_norm: Positive | None = None
    """Gradient norm over all adapter weights to which a trial is clipped, at the reference alpha; null: not clipped."""
    dtype: Dtype = "float32"
    """Number format of the training. auto: what the model was saved in, as in transformers; float32 for a task without
    a saved model."""
    seed: Seed = 0
    """Seed of the data order and of the adapters' initialisation."""

    @field_validator("optimizer")
    @classmethod
    def _has_a_law(cls, name: str) -> str:
        try:
            law_of(name)
        except NoLawError as error:
            if name in WITHOUT_LAW:
                raise refuse(f"an optimizer with an alpha equivalence ({', '.join(LAWS)})", name, str(error)) from None
            raise refuse(one_of(LAWS), name, did_you_mean(name, LAWS)) from None
        return name

    @field_validator("warmup_steps")
    @classmethod
    def _ends_before_training(cls, warmup_steps: int, read: ValidationInfo) -> int:
        if warmup_steps >= read.data.get("steps", warmup_steps + 1):
            raise refuse(f"fewer than train.steps, which is {read.data['steps']}", warmup_steps)
        return warmup_steps

    @field_validator("momentum")
    @classmethod
    def _is_the_optimizers(cls, momentum: float | None, read: ValidationInfo) -> float | None:
        law = LAWS.get(read.data.get("optimizer", ""))
        if momentum and law is not None and "momentum" not in law.options:
            hint = "set betas" if "betas" in law.options else "leave it out"
            raise refuse(f"no momentum for {law.name}", momentum, f"{hint}, or use optimizer: sgd")
        return momentum

    @field_validator("options")
    @classmethod
    def _options_are_the_optimizers(cls, options: dict[str, Any], read: ValidationInfo) -> dict[str, Any]:
        law = LAWS.get(read.data.get("optimizer", ""))
        if law is None:
            return options
        mistakes = list(_option_mistakes(options, law))
        if mistakes:
            raise refusal(mistakes)
        return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        try:
            self.law.settings(self.settings)
        except ValueError as error:
            raise refuse("options that go together", self.options, str(error), path=("options",)) from None
        if not self.law.scheduled and self.warmup_steps:
            hint = f"{self.optimizer} reads lr at its first step only, and a warm-up starts it at 0"
            raise refuse(f"0 for {self.optimizer}", self.warmup_steps, hint, path=("warmup_steps",))
        return self

    @property
    def law(self) -> OptimizerLaw:
        """The optimizer's law."""
        return law_of(self.optimizer)

    @property
    def unused(self) -> tuple[str, ...]:
        """The keys that are written, but that the optimizer does not have."""
        has = {*self.law.absolute, *self.law.options}
        return tuple(name for name in ("eps", "betas") if getattr(self, name) is not None and name not in has)

    @property
    def constants(self) -> dict[str, Constant]:
        """The optimizer's absolute constants at the reference alpha, the defaults filled in."""
        written = {**self.options, "eps": self.eps}
        return self.law.constants({name: value for name, value in written.items() if value is not None})

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's other settings, the defaults filled in."""
        written = {**self.options, "betas": self.betas, "momentum": self.momentum}
        known = self.law.options
        return {name: option.default if written.get(name) is None else written[name] for name, option in known.items()}


_OWN_KEYS = ("lr", "weight_decay", "eps", "betas", "momentum")


def _option_mistakes(options: Mapping[str, Any], law: OptimizerLaw) -> Iterator[Mistake]:
    every: dict[str, Absolute | Option] = {**law.absolute, **law.options}
    rows = {name: row for name, row in every.items() if name not in _OWN_KEYS}
    for name, value in options.items():
        if name in rows:
            if not rows[name].accepts(value):
                yield Mistake((name,), rows[name].required, shown(value))
        elif name in _OWN_KEYS:
            where = "parameters" if name in ("lr", "weight_decay") else "train"
            yield Mistake((name,), f"it as {where}.{name}", shown(value), "it has a key of its own")
        else:
            required = f"{one_of(rows)}" if rows else "nothing"
            yield Mistake(
                (name,), f"{required}, as {law.name} has it", f"the unknown key {shown(name)}", did_you_mean(name, rows)
            )


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class MetricSpec(Section):
    """What makes one trial better than another."""

    name: str = "eval/loss"
    """A metric that the task reports."""
    goal: Goal = Field("minimize", json_schema_extra=_without_default)
    """Which way is better; unless written, as the task says."""

    @property
    def sign(self) -> Literal[1, -1]:
        """What the metric is multiplied by so that less is better."""
        return 1 if self.goal == "minimize" else -1


# -- how it is searched ------------------------------------------------------------------------------------------------


def _rising(rungs: tuple[int, ...] | None) -> tuple[int, ...] | None:
    pairs = enumerate(zip((rungs or ())[:-1], (rungs or ())[1:], strict=True), start=1)
    wrong = [
        Mistake((index,), f"more than {before}, the rung before it", str(rung))
        for index, (before, rung) in pairs
        if rung <= before
    ]
    if wrong:
        raise refusal(wrong)
    return rungs


class _Pruner(Section):
    rungs: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Step counts at which trials report and may be pruned; rising, the last one is train.steps. null: a quarter, a
    half and all of train.steps; without pruning the end alone."""

    _check_rungs = field_validator("rungs")(_rising)


class SuccessiveHalving(_Pruner):
    """At each rung the best go on."""

    type: Literal["successive_halving"]
    """The name of the pruner."""
    reduction_factor: Annotated[int, Strict(), Field(ge=2)] = 3
    """Of the trials at a rung, the best 1 in so many goes on."""


class MedianPruner(_Pruner):
    """At each rung a trial goes on if it is better than the median of those before it."""

    type: Literal["median"]
    """The name of the pruner."""
    warmup_trials: CountOrZero = 5
    """Trials that run to the end before any is pruned."""


class NoPruner(_Pruner):
    """Every trial runs to the end; rungs are where it reports."""

    type: Literal["none"]
    """The name of the pruner."""


Pruner = Annotated[SuccessiveHalving | MedianPruner | NoPruner, ByType()]


MOST_TRIALS = 1_000_000


class SearchSpec(Section):
    """How configurations are chosen."""

    method: Literal["gp", "tpe", "random", "grid", "cmaes"] = "gp"
    """Optuna's sampler. grid: every class once, parameters as values only."""
    trials: Annotated[int, Strict(), Field(ge=1, le=MOST_TRIALS)] | None = None
    """Classes to try; null: 64, or every class of a grid."""
    pruner: Pruner = SuccessiveHalving(type="successive_halving")
    """Which trials are stopped early."""
    seed: Seed = 0
    """Seed of the search."""
    order: Literal["reproducible", "asynchronous"] = "reproducible"
    """reproducible: suggestions depend on the spec, its seeds, the pack size and the number of workers, never on which
    worker finishes first; for the same ones on another machine write compute.pack and compute.workers as numbers, since
    auto follows the machine. asynchronous: a worker never waits."""

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Returns the step counts at which trials report, rising.

        Args:
            steps: train.steps, the last of them.
        """
        if self.pruner.rungs is not None:
            return self.pruner.rungs
        if isinstance(self.pruner, NoPruner):
            return (steps,)
        return tuple(sorted({max(1, steps // 4), max(1, steps // 2), steps}))


class CertifySpec(Section):
    """How much of the reduction is proved by training twins."""

    classes: CountOrZero = 4
    """Classes whose twins are really trained."""
    steps: Count = 50
    """Steps that twins are trained for, at most train.steps; unless written, no more than that."""


# -- where it runs -----------------------------------------------------------------------------------------------------

# More of either is a slip of the pen; unbounded, it would be believed, and memory asked for accordingly.
MOST_WORKERS = MOST_MEMBERS = 4096

WorkersOrAuto = Annotated[
    Annotated[int, Strict(), Field(ge=1, le=MOST_WORKERS)] | Literal["auto"],
    in_one(f"an integer from 1 to {MOST_WORKERS}, or auto"),
]
PackOrAuto = Annotated[
    Annotated[int, Strict(), Field(ge=1, le=MOST_MEMBERS)] | Literal["auto"],
    in_one(f"an integer from 1 to {MOST_MEMBERS}, or auto"),
]


class ComputeSpec(Section):
    """What a sweep may use; auto: what there is."""

    workers: WorkersOrAuto = "auto"
    """Jobs at the same time, at most 4096. auto: as many as there is room for, on nodes that can be added too."""
    gpus_per_worker: Annotated[
        Annotated[float, Strict(), Field(ge=0)] | Literal["auto"], in_one("a number of at least 0, or auto")
    ] = "auto"
    """GPUs of one worker; fractions share one, and its memory. auto: one where there are any. More than one spread a
    model of transformers over them, layer by layer, for a model that one GPU does not hold: they compute in turn, so
    that a model which fits on one trains faster with a worker for each GPU. Written and tested without GPUs: no run on
    several has been seen yet."""
    pack: PackOrAuto = "auto"
    """Trials that one worker trains at once, at most 4096 and no more than its memory holds."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_whole_above_one(cls, gpus: float | str) -> float | str:
        if isinstance(gpus, float) and gpus > 1 and not gpus.is_integer():
            required = "a whole number of GPUs, or a share of one"
            raise refuse(
                required, gpus, f"Ray splits no GPU among workers that have others: write {math.ceil(gpus)} or 1"
            )
        return gpus


class TrackingSpec(Section):
    """Where the sweep is recorded in MLflow."""

    uri: str | None = None
    """MLflow's tracking address; null: MLflow's own default."""
    experiment: str | None = None
    """The experiment; null: the sweep's name."""

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        # The spec is stored in the ledger and in MLflow, where a secret must not appear.
        try:
            urlsplit(uri or "")
        except ValueError:
            raise refuse("an address", uri) from None
        if has_secret(uri or ""):
            way_out = "leave uri out and set MLFLOW_TRACKING_URI in the environment"
            raise refusal([Mistake((), "an address without a password", "one with a password", way_out)])
        return uri
