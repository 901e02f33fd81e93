"""The table of optimizers: how each one's constants move with a gauge, and what torch calls them.

    symbol  meaning
    g       a gradient
    p       gradient degree of the optimizer: its update scales as g**p
    f       the gauge's factor on one adapter factor (a for A, b for B): weights become w / f, gradients f g
    power   of a constant: it becomes constant x f**power

An optimizer is one row here. Its constants are of three kinds:

    lr, weight decay    every optimizer's: lr has the power -(1+p); L2 decay, which joins the gradient, 2; decoupled
                        decay, of which lr x decay alone matters, 1+p
    absolute            those that are added to, or compared with, gradients or weights: Adam's eps has the power 1
    options             pure numbers, flags and words: no gauge moves them

`tests/lora_core/test_conformance.py` runs every row: twins at powers of two are bit-identical. No torch here.

Source of names, defaults and formulas: torch.optim, 2.11 to 2.13.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

Decay = Literal["l2", "decoupled"]
Constant = float | tuple[float, ...]

Kernel = Literal["fused", "foreach", "loop"]
"""How torch runs through the parameters: one kernel for all, one operation for all, or one after the other."""


class NoLawError(ValueError):
    """An optimizer for which no equivalence between values of alpha is known; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Absolute:
    """A constant that a gauge moves.

    Attributes:
        default: torch's, or a positive one where torch's 0 would divide by zero.
        power: it becomes constant x f**power.
        telling: a value at which it changes a run that has gradients of about 0.1, for the conformance suite.
        required: what a value must be, in words.
        accepts: whether a value is that.
        at_construction: torch reads it when the optimizer is made, and not from a parameter group.
    """

    default: Constant
    power: int
    telling: Constant
    required: str
    accepts: Callable[[Any], bool]
    at_construction: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """A setting that no gauge moves.

    Attributes:
        default: torch's.
        required: what a value must be, in words.
        accepts: whether a value is that.
        states: tensors of a weight's size that it makes the optimizer keep.
    """

    default: Any
    required: str
    accepts: Callable[[Any], bool]
    states: int = 0


def _no_conflict(settings: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class OptimizerLaw:
    """A row of the table.

    Attributes:
        name: the optimizer's name in a spec.
        kind: its class in torch.optim.
        degree: p, the degree of its update in the gradient.
        decay: how weight decay enters: added to the gradient (`l2`), applied beside it (`decoupled`), or not at all.
        states: tensors of a weight's size that it keeps, besides those of its options.
        absolute: its constants that a gauge moves, by torch's keyword.
        options: its settings that no gauge moves, by torch's keyword.
        fixed: keywords that make it this optimizer and not another of the same class.
        fused: whether torch has a fused kernel for it on CPU and CUDA: `exact` where it is right for float32 and
            wider only.
        wrong_in_half: options with which torch is wrong in half precision.
        matrices: whether it works on whole matrices; else element by element.
        arithmetic: the number format that it computes in, whatever the weights are kept in; None for theirs.
        scheduled: whether it reads lr at every step; else a schedule changes nothing after the first one.
        variants: sets of options that the conformance suite runs beside the defaults.
        conflict: what is wrong with options that are each right by themselves, in words; None where nothing is.
    """

    name: str
    kind: str
    degree: int
    decay: Decay | None
    states: int
    absolute: Mapping[str, Absolute] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fused: Literal[True, False, "exact"] = False
    wrong_in_half: Mapping[str, Any] = field(default_factory=dict)
    matrices: bool = False
    arithmetic: Literal["bfloat16"] | None = None
    scheduled: bool = True
    variants: tuple[Mapping[str, Any], ...] = ()
    conflict: Callable[[Mapping[str, Any]], str | None] = _no_conflict

    @property
    def lr_power(self) -> int:
        """The power of lr: -(1+p)."""
        return -(1 + self.degree)

    @property
    def decay_power(self) -> int:
        """The power of weight decay."""
        return 1 + self.degree if self.decay == "decoupled" else 2

    @property
    def powers(self) -> dict[str, int]:
        """The powers of its absolute constants, by keyword."""
        return {name: constant.power for name, constant in self.absolute.items()}

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The ways in which torch can run through its parameters."""
        if self.matrices:
            return ("loop",)
        return ("fused", "foreach", "loop") if self.fused else ("foreach", "loop")

    def constants(self, given: Mapping[str, Constant] | None = None) -> dict[str, Constant]:
        """Every absolute constant: the given ones, else the defaults. What it does not have is left out."""
        given = given or {}
        return {name: given.get(name, constant.default) for name, constant in self.absolute.items()}

    def settings(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every option: the given ones, else the defaults.

        Raises:
            ValueError: an option that it does not have, a value that it does not take, or values that do not go
                together.
        """
        given = dict(given or {})
        for name, value in given.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.name} has the options {known}; found {name}={value!r}")
            if not self.options[name].accepts(value):
                raise ValueError(f"{name} of {self.name} must be {self.options[name].required}; found {value!r}")
        settings = {name: option.default for name, option in self.options.items()} | given
        if (conflict := self.conflict(settings)) is not None:
            raise ValueError(conflict)
        return settings

    def states_with(self, settings: Mapping[str, Any]) -> int:
        """Tensors of a weight's size that it keeps under these settings."""
        return self.states + sum(option.states for name, option in self.options.items() if settings.get(name))

    def check_half_precision(self, settings: Mapping[str, Any]) -> None:
        """Refuses settings with which torch is wrong in half precision.

        Raises:
            ValueError: these are such.
        """
        wrong = self.wrong_in_half
        if wrong and all(settings[name] == value for name, value in wrong.items()):
            said = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            raise ValueError(
                f"torch's {self.kind} is wrong in half precision with {said}: keep the adapters in float32 or leave it"
            )

    def describe_two(self) -> str:
        """One line: what the same run has in another two-parameter gauge."""
        moved = {"lr": self.lr_power} | self.powers
        if self.decay is not None:
            moved["weight_decay"] = self.decay_power
        parts = [
            f"{name} of {factor} {_times(factor.lower(), power)}" for name, power in moved.items() for factor in "AB"
        ]
        said = ", ".join(["alpha x a b", "init_scale / a", *parts])
        return f"{self.name}: for any a and b the same training run has {said}"

    def describe(self) -> str:
        """One line: what the same run has at k times the alpha, with one learning rate for A and B."""
        moved = {"lr": self.lr_power, "init_scale": -1} | self.powers
        if self.decay is not None:
            moved["weight_decay"] = self.decay_power
        moved["clip_norm"] = 1
        parts = [f"{name} {_in_words(power)}" for name, power in moved.items()]
        return f"{self.name}: the same training run at alpha x k has " + ", ".join(parts)


def _times(factor: str, power: int) -> str:
    """`/ a`, `x b**2`."""
    return f"{'x' if power > 0 else '/'} {factor}{'' if abs(power) == 1 else f'**{abs(power)}'}"


def _in_words(power: int) -> str:
    """What a constant of this power is multiplied by when alpha x k, with f = sqrt(k): `/ sqrt(k)`, `x k`."""
    root = {1: "sqrt(k)", 2: "k"}.get(abs(power), f"k**({abs(power)}/2)")
    return f"{'x' if power > 0 else '/'} {root}"


def law_of(optimizer: str) -> OptimizerLaw:
    """Returns the law of an optimizer.

    Raises:
        NoLawError: the optimizer has no law (the reason is named), or is not known.
    """
    if optimizer in LAWS:
        return LAWS[optimizer]
    if optimizer in WITHOUT_LAW:
        raise NoLawError(
            f"{optimizer} has no alpha equivalence: {WITHOUT_LAW[optimizer]}; use one of {', '.join(LAWS)}"
        )
    close = difflib.get_close_matches(optimizer.lower(), LAWS, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise NoLawError(f"no law is known for the optimizer {optimizer!r}; use one of {', '.join(LAWS)}{meant}")


# -- what values may be ------------------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _not_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _below_one(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _two_below_one(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_below_one, value))


def _etas(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(map(_positive, value)) and value[0] < 1 < value[1]
    )


def _two_rising(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_positive, value)) and value[0] < value[1]


def _three_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_number, value))


def _few_steps(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 100


def _lr_adjustment(value: Any) -> bool:
    return value in ("original", "match_rms_adamw")


def _nesterov_conflict(settings: Mapping[str, Any]) -> str | None:
    if settings["nesterov"] and not (settings["momentum"] > 0 and settings["dampening"] == 0):
        found = f"momentum={settings['momentum']!r}, dampening={settings['dampening']!r}"
        return f"nesterov takes a momentum above 0 and no dampening; found {found}"
    return None


_Eps = partial(Absolute, power=1, telling=1e-2, required="a number above 0", accepts=_positive)
_Fraction = partial(Option, required="a number from 0 to below 1", accepts=_below_one)
_NotNegative = partial(Option, required="a number of at least 0", accepts=_not_negative)
_Flag = partial(Option, False, required="true or false", accepts=_flag)
_BETAS = Option((0.9, 0.999), "two numbers from 0 to below 1", _two_below_one)

# -- the table ---------------------------------------------------------------------------------------------------------

_ADAM: dict[str, Any] = {
    "degree": 0,
    "states": 2,
    "absolute": {"eps": _Eps(1e-8)},
    "options": {"betas": _BETAS, "amsgrad": _Flag(states=1)},
    "fused": True,
    "variants": ({"amsgrad": True},),
}
_NADAM: dict[str, Any] = {
    "kind": "NAdam",
    "degree": 0,
    "states": 2,
    "absolute": {"eps": _Eps(1e-8)},
    "options": {"betas": _BETAS, "momentum_decay": _NotNegative(4e-3)},
}

LAWS: dict[str, OptimizerLaw] = {
    law.name: law
    for law in (
        OptimizerLaw(
            "sgd",
            kind="SGD",
            degree=1,
            decay="l2",
            states=0,
            options={"momentum": _Fraction(0.0, states=1), "dampening": _Fraction(0.0), "nesterov": _Flag()},
            fused="exact",  # on CPU the fused one skips half-precision weights: pytorch#191763
            variants=(
                {"momentum": 0.9},
                {"momentum": 0.9, "dampening": 0.5},
                {"momentum": 0.9, "nesterov": True},
            ),
            conflict=_nesterov_conflict,
        ),
        OptimizerLaw("adam", kind="Adam", decay="l2", **_ADAM),
        OptimizerLaw("adamw", kind="AdamW", decay="decoupled", **_ADAM),
        OptimizerLaw("nadam", decay="l2", fixed={"decoupled_weight_decay": False}, **_NADAM),
        OptimizerLaw("nadamw", decay="decoupled", fixed={"decoupled_weight_decay": True}, **_NADAM),
        OptimizerLaw(
            "adamax",
            kind="Adamax",
            degree=0,
            decay="l2",
            states=2,
            absolute={"eps": _Eps(1e-8)},
            options={"betas": _BETAS},
        ),
        OptimizerLaw(
            "rmsprop",
            kind="RMSprop",
            degree=0,
            decay="l2",
            states=1,
            absolute={"eps": _Eps(1e-8)},
            options={
                "alpha": _Fraction(0.99),
                "momentum": _Fraction(0.0, states=1),
                "centered": _Flag(states=1),
            },
            variants=({"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}),
        ),
        OptimizerLaw(
            "adagrad",
            kind="Adagrad",
            degree=0,
            decay="l2",
            states=1,
            absolute={
                "eps": _Eps(1e-10),
                # A sum of squared gradients.
                "initial_accumulator_value": Absolute(
                    0.0, 2, 1e-2, "a number of at least 0", _not_negative, at_construction=True
                ),
            },
            options={"lr_decay": _NotNegative(0.0)},
            variants=({"lr_decay": 0.1},),
        ),
        OptimizerLaw(
            "adadelta",
            kind="Adadelta",
            # A step is g x sqrt(sum of steps**2 + eps) / sqrt(sum of g**2 + eps). torch sums steps before lr, so with
            # eps x f**2 they scale as g does.
            degree=1,
            decay="l2",
            states=2,
            absolute={"eps": _Eps(1e-6, power=2, telling=1e-4)},
            options={"rho": _Fraction(0.9)},
            variants=({"rho": 0.5},),
        ),
        OptimizerLaw(
            "rprop",
            kind="Rprop",
            degree=0,  # only the gradient's sign counts
            decay=None,
            states=2,
            # The least and the largest step; lr is the first one.
            absolute={
                "step_sizes": Absolute((1e-6, 50.0), -1, (1e-3, 2e-2), "two rising numbers above 0", _two_rising)
            },
            options={"etas": Option((0.5, 1.2), "two numbers, one below 1 and one above", _etas)},
            scheduled=False,
        ),
        OptimizerLaw(
            "muon",
            kind="Muon",
            degree=0,  # the gradient's direction counts: an orthogonal matrix near it
            decay="decoupled",
            states=1,
            absolute={"eps": _Eps(1e-7, telling=0.1)},  # the least norm of a gradient
            options={
                "momentum": _Fraction(0.95),
                "nesterov": Option(True, "true or false", _flag),
                "ns_steps": Option(5, "a whole number from 1 to 99", _few_steps),
                "ns_coefficients": Option((3.4445, -4.775, 2.0315), "three numbers", _three_numbers),
                "adjust_lr_fn": Option("original", "original or match_rms_adamw", _lr_adjustment),
            },
            matrices=True,
            arithmetic="bfloat16",
            wrong_in_half={"nesterov": False},  # it orthogonalises the momentum itself, in place: pytorch#194664
            variants=({"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}),
        ),
        OptimizerLaw(
            "asgd",
            kind="ASGD",
            degree=1,
            decay="l2",
            states=1,
            absolute={"lambd": Absolute(1e-4, 2, 0.3, "a number of at least 0", _not_negative)},  # a decay of its own
            options={
                "alpha": Option(0.75, "a number above 0", _positive),
                "t0": Option(1e6, "a number above 0", _positive),
            },
        ),
    )
}
"""The optimizers of torch.optim that train dense parameters and have a law."""

WITHOUT_LAW: dict[str, str] = {
    "radam": "its warm-up phase takes steps of degree 1 in the gradient and, with beta2 above 2/3, its later phase of "
    "degree 0, so no one power of k compensates alpha",
    "adafactor": "its first eps is compared with a mean of squared gradients, and its square with squared gradients, "
    "so no one power of k serves both",
    "lbfgs": "its first step is divided by the gradient's norm only where that is above 1, an absolute constant, and "
    "it evaluates the loss several times a step",
    "sparseadam": "it takes sparse gradients only, and those of adapters are dense",
}
"""Optimizers that were looked at and have none; why."""
