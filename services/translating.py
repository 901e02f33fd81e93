"""`lora-sweeps translate`: the click command, and what it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from sweeps.errors import InputError

if TYPE_CHECKING:
    from lora_core.laws import Constant
    from lora_core.presets import Preset
    from services.schemas import Translate
    from sweeps.translate import Run, Translation


def _number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"required a number; found {text!r}") from None


def _rank(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"required a whole number; found {text!r}") from None


def _constant(text: str) -> tuple[str, float | tuple[float, ...]]:
    name, _, values = text.partition("=")
    try:
        numbers = tuple(map(float, values.split(",")))
    except ValueError:
        numbers = ()
    if not (name and numbers):
        required = "NAME=VALUE with a number, or numbers with commas between"
        raise click.BadParameter(f"required {required}; found {text!r}")
    return name, numbers[0] if len(numbers) == 1 else numbers


@click.command()
@click.option("--optimizer", metavar="NAME", help="How alpha and lr trade depends on it. Default: adamw.")
@click.option("--rank", type=_rank, metavar="NUMBER", help="r.")
@click.option("--alpha", metavar="NUMBER", help='Or a rule: "2*rank", "8*sqrt(rank)".')
@click.option("--lr", type=_number, metavar="NUMBER", help="Learning rate; that of A where --lr-ratio is not 1.")
@click.option(
    "--lr-ratio",
    type=_number,
    metavar="NUMBER",
    default=1.0,
    help="Learning rate of B as a multiple (LoRA+). Default: 1.",
)
@click.option(
    "--init-scale",
    type=_number,
    metavar="NUMBER",
    default=1.0,
    help="Factor on the size of A's initialisation. Default: 1.",
)
@click.option("--weight-decay", type=_number, metavar="NUMBER", help="Default: 0; torch.optim.AdamW's own is 0.01.")
@click.option("--eps", type=_number, metavar="NUMBER", help="Default: the optimizer's.")
@click.option(
    "--constant",
    "constants",
    type=_constant,
    metavar="NAME=VALUE",
    multiple=True,
    help="Another absolute constant of the optimizer: lambd=1e-4.",
)
@click.option(
    "--clip-norm",
    type=_number,
    metavar="NUMBER",
    help="Gradient norm to which the run is clipped. Default: not clipped.",
)
@click.option("--rslora", is_flag=True, help="The scaling is alpha / sqrt(rank).")
@click.option("--from-preset", metavar="NAME", help="A published recipe, for what is not given: roberta-base-nlu.")
@click.option("--to-alpha", metavar="NUMBER", help="The run with this alpha, or by a rule; with an init scale too.")
@click.option(
    "--to-scaling",
    type=_number,
    metavar="NUMBER",
    help="The run with this scaling: alpha / rank, or alpha / sqrt(rank) under rsLoRA.",
)
@click.option("--to-lr", type=_number, metavar="NUMBER", help="The run with this learning rate: at which alpha?")
@click.option("--to-init-scale", type=_number, metavar="NUMBER", help="The run with this init scale.")
@click.option("--to-default-init", is_flag=True, help="The run with init scale 1, for a trainer that has no such key.")
@click.option("--to-rslora", is_flag=True, help="alpha as rsLoRA reads it; alone, the same scaling.")
@click.option("--to-lora", is_flag=True, help="alpha as LoRA reads it; alone, the same scaling.")
@click.option("--to-rank", metavar="NUMBER", help="Refused, with the reason.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def translate(as_json: bool, from_preset: str | None, to_rank: str | None, **options: Any) -> None:
    """Write a training run with another alpha, lr or init scale: the same run."""
    from sweeps.translate import NO_OTHER_RANK, Run, Target, Written
    from sweeps.translate import translate as write_anew

    if to_rank is not None:
        raise InputError(f"{NO_OTHER_RANK}; found --to-rank {to_rank}")
    targets = _targets(options)
    constants = _by_name(options["constants"], options["eps"])
    preset = None if from_preset is None else _preset(from_preset)
    own = ("optimizer", "rank", "alpha", "lr", "lr_ratio", "init_scale", "weight_decay", "clip_norm", "rslora")
    written = Written(**{name: options[name] for name in own}, constants=constants, preset=preset)
    translation = write_anew(Run.of(written), Target(**targets))
    warnings = _warnings(translation, preset)
    if as_json:
        click.echo(json.dumps(as_object(translation), indent=2))
        _print_warnings(warnings, err=True)
    else:
        _print_in_words(translation)
        _print_warnings(warnings, err=False)


def _targets(options: dict[str, Any]) -> dict[str, Any]:
    for one, other in (("to_rslora", "to_lora"), ("to_default_init", "to_init_scale")):
        if options[one] and options[other] not in (None, False):
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise click.UsageError(f"{flags[0]} and {flags[1]} contradict each other: leave one out.")
    targets = {name: options[f"to_{name}"] for name in ("alpha", "scaling", "lr", "init_scale")}
    if options["to_default_init"]:
        targets["init_scale"] = 1.0
    targets["rslora"] = True if options["to_rslora"] else False if options["to_lora"] else None
    if all(value is None for value in targets.values()):
        raise click.UsageError(
            "translate needs a target: --to-alpha, --to-scaling, --to-lr, --to-init-scale, --to-default-init, "
            "--to-rslora or --to-lora."
        )
    return targets


def _by_name(pairs: tuple[tuple[str, Constant], ...], eps: float | None) -> dict[str, Constant]:
    every = [*pairs, *([] if eps is None else [("eps", eps)])]
    twice = {name for name, _ in every if sum(name == other for other, _ in every) > 1}
    if twice:
        raise click.UsageError(f"each constant must be given once; found {', '.join(sorted(twice))} again.")
    return dict(every)


def _preset(name: str) -> Preset:
    from lora_core.presets import PresetError, preset

    try:
        return preset(name)
    except PresetError as error:
        raise InputError(str(error)) from None


# -- JSON --------------------------------------------------------------------------------------------------------------


def translation_of(asked: Translate) -> Translation:
    """What was asked for over HTTP."""
    from sweeps.translate import Run, Target, Written
    from sweeps.translate import translate as write_anew

    given = asked.model_dump()
    targets = {name.removeprefix("to_"): given.pop(name) for name in list(given) if name.startswith("to_")}
    if all(value is None for value in targets.values()):
        raise InputError(
            "translate needs a target: to_alpha, to_scaling, to_lr, to_init_scale or to_rslora; found none"
        )
    name = given.pop("preset")
    return write_anew(Run.of(Written(**given, preset=None if name is None else _preset(name))), Target(**targets))


def as_object(translation: Translation) -> dict[str, Any]:
    """What `translate --json` prints: the same run; a constant that differs between A and B is {"a": ..., "b": ...}."""
    run, gauge = translation.run, translation.gauge
    point = run.point
    constants = {name: _of_both(point.a.constants[name], point.b.constants[name]) for name in point.a.constants}
    printed = {
        "rank": point.rank,
        "alpha": run.alpha,
        "rslora": run.rslora,
        "scaling": point.scaling,
        "lr": point.a.lr,
        "lr_ratio": run.lr_ratio,
        "init_scale": point.init_scale,
        "weight_decay": None if run.law.decay is None else _of_both(point.a.weight_decay, point.b.weight_decay),
        "eps": constants.pop("eps", None),
        "clip_norm": point.clip_norm,
        "optimizer": run.law.name,
        "bit_exact": translation.bit_exact,
        "gauge": {"a": gauge.a, "b": gauge.b},
    }
    return printed | ({"constants": constants} if constants else {})


def _of_both(of_a: Constant, of_b: Constant) -> Any:
    return of_a if of_a == of_b else {"a": of_a, "b": of_b}


# -- in words ----------------------------------------------------------------------------------------------------------


def _print_in_words(translation: Translation) -> None:
    rows = [("", "given", "the same run"), *_rows(translation)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo()
    click.echo(_exactness(translation))
    options = "".join(f"{name}, " for name in translation.run.law.options)
    click.echo(f"unchanged: rank, {options}the schedule's shape and warm-up, steps, batch size, seeds, data order")


def _rows(translation: Translation) -> list[tuple[str, str, str]]:
    new = translation.run.point
    apart = {name for name in new.a.constants if new.a.constants[name] != new.b.constants[name]}
    if new.a.weight_decay != new.b.weight_decay:
        apart.add("weight decay")
    given, run = (_quantities(one, apart) for one in (translation.given, translation.run))
    # Left out where neither run makes use of it.
    plain = {"alpha read as": "LoRA", "lr ratio": 1.0, "clip norm": None}
    shown = [name for name in given if not (name in plain and given[name] == run[name] == plain[name])]
    return [(name, in_digits(given[name]), in_digits(run[name])) for name in shown]


def _quantities(run: Run, apart: set[str]) -> dict[str, Any]:
    """What is shown of a run, by its label; `apart` are the labels that A and B have a value of their own for."""
    point = run.point
    of_both: dict[str, tuple[Constant, Constant]] = {}
    if run.law.decay is not None:
        of_both["weight decay"] = (point.a.weight_decay, point.b.weight_decay)
    of_both |= {name: (value, point.b.constants[name]) for name, value in point.a.constants.items()}
    found: dict[str, Any] = {
        "rank": point.rank,
        "alpha": run.alpha,
        "alpha read as": "rsLoRA" if run.rslora else "LoRA",
        "scaling": point.scaling,
        "lr": point.a.lr,
        "lr ratio": run.lr_ratio,
        "init scale": point.init_scale,
    }
    for name, (of_a, of_b) in of_both.items():
        found |= {f"{name} of A": of_a, f"{name} of B": of_b} if name in apart else {name: of_a}
    return found | {"clip norm": point.clip_norm}


def in_digits(value: Any) -> str:
    """A value with digits enough to be typed into a config, and no more."""
    if isinstance(value, tuple):
        return ", ".join(map(in_digits, value))
    if not isinstance(value, float):
        return str(value)
    short = f"{value:.6g}"
    return short if float(short) == value else repr(value)


def _exactness(translation: Translation) -> str:
    gauge = translation.gauge
    a, b = in_digits(gauge.a), in_digits(gauge.b)
    alike = gauge.a == gauge.b
    factors = f"the factor {a} on A and B is" if alike else f"the factors {a} on A and {b} on B are"
    powers = "a power of two" if alike else "powers of two"
    if not gauge.exact_in_binary:
        no_powers = "no power of two" if alike else "not both powers of two"
        near = "; alpha times a power of 4 is bit-exact" if alike else ""
        return f"not bit-exact: {factors} {no_powers}, so the runs are the same up to rounding{near}"
    if not translation.bit_exact:
        return f"not bit-exact: {factors} {powers}, but a number above had to be rounded to be written down"
    clip = ""
    if translation.run.point.clip_norm is not None:
        clip = " (with an exact clip: torch's clip_grad_norm_ adds 1e-6 to the norm)"
    return f"bit-exact: {factors} {powers}, so rounding is the same in both runs{clip}"


# -- warnings ----------------------------------------------------------------------------------------------------------


def _warnings(translation: Translation, preset: Preset | None) -> list[str]:
    warnings = []
    by_hand = _set_by_hand(translation)
    if by_hand:
        warnings.append(f"set by hand in the trainer, or it is another run: {'; '.join(by_hand)}")
    if preset is not None and preset.also_trained:
        others = " and ".join(preset.also_trained)
        warnings.append(
            f"{preset.name} trains {others} too, with the lr and the clip norm of the adapters: give it an lr of its "
            f"own ({in_digits(translation.given.point.a.lr)}, as it was) and keep it outside the clip"
        )
    return warnings


def _set_by_hand(translation: Translation) -> list[str]:
    """What moved although most trainers' configs leave it out, in words."""
    given, run = translation.given.point, translation.run.point
    moved = []
    if run.init_scale != 1:
        moved.append(f"init scale {in_digits(run.init_scale)} (multiply A by it once it is drawn)")
    of_a, of_b = ({"weight decay": settings.weight_decay, **settings.constants} for settings in (run.a, run.b))
    before = {"weight decay": given.a.weight_decay, **given.a.constants}
    for name, value in of_a.items():
        if value != of_b[name]:
            moved.append(f"{name} {in_digits(value)} for A and {in_digits(of_b[name])} for B")
        elif value != before[name]:
            moved.append(f"{name} {in_digits(value)}")
    return moved


def _print_warnings(warnings: list[str], *, err: bool) -> None:
    for warning in warnings:
        click.echo(f"warning: {warning}", err=err)
