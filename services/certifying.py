"""`lora-sweeps certify`: trains twins, writes certificates, and checks those that others wrote."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sweeps.errors import InputError

if TYPE_CHECKING:
    from sweeps.certificates import CertificateFile, Check
    from sweeps.certifying import ClassOrder
    from sweeps.collapse import Certificate, TwinVerdict
    from sweeps.home import Home
    from sweeps.preflight import Preflight
    from sweeps.reduction import Reduction
    from sweeps.space import Configuration
    from sweeps.spec import SpecDocument, SweepSpec

_MOST_BESIDE = 64
"""Classes in a pack, if memory holds them."""


@click.command()
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@click.option("--classes", metavar="all|N", help="How many classes to certify (default: all).")
@click.option("--configuration", metavar="rank=8,alpha=16,lr=1e-3", multiple=True, help="Certify this one's class.")
@click.option(
    "--twin", metavar="rank=8,alpha=64,lr=5e-4", multiple=True, help="Put a claim on trial: is this its twin?"
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each run (default: the spec's certify.steps).")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write the certificate. One that is there is replaced, any other file is kept.",
)
@click.option("--check", type=click.Path(path_type=Path), help="Train all of a certificate again; takes no SPEC.")
@click.option("--optimizer", metavar="PACKAGE.MODULE:CLASS", help="Find the law of an optimizer of your own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def certify(
    spec: Path | None,
    classes: str | None,
    configuration: tuple[str, ...],
    twin: tuple[str, ...],
    steps: int | None,
    output: Path | None,
    check: Path | None,
    optimizer: str | None,
    as_json: bool,
) -> None:
    """Prove that configurations are one training run: train twins, and compare every loss and update.

    Exits 0 if every certificate holds, else 1.
    """
    if (spec is None) == (check is None):
        raise click.UsageError("certify takes either a SPEC or --check FILE.")
    if twin and len(configuration) != 1:
        raise click.UsageError("--twin goes with one --configuration, whose twin it is said to be.")
    if check is not None:
        if configuration or steps or output or optimizer or classes is not None:
            raise click.UsageError("--check trains what the certificate says, and takes --json only.")
        with _interruptible():
            sys.exit(_check(check, as_json=as_json))
    assert spec is not None
    if optimizer is not None:
        from services.discovering import discover

        if twin or output or classes is not None or len(configuration) > 1:
            raise click.UsageError("--optimizer goes with --steps, --json and at most one --configuration.")
        named = next(iter(configuration), None)
        with _interruptible():
            sys.exit(discover(spec, optimizer, configuration=named, steps=steps, as_json=as_json))
    if configuration and classes is not None:
        raise click.UsageError("--classes says how many classes, --configuration which: give one of them.")
    choose = partial(_chosen, count=_count(classes or "all"), configurations=configuration, twins=twin)
    with _interruptible():
        sys.exit(_certify(spec, choose, steps, output, as_json=as_json))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the command in words, with the exit code that shells know."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nstopped before all was trained, so there is no verdict", err=True)
        sys.exit(128 + signal.SIGINT)


def _count(classes: str) -> int | None:
    if classes == "all":
        return None
    # A number of a thousand digits is none that Python reads.
    if not (classes.isascii() and classes.isdecimal() and len(classes) < 10) or int(classes) < 1:
        raise InputError(f"--classes must be all or a number from 1 to 999,999,999; found {classes!r}")
    return int(classes)


def _certify(
    path: Path,
    choose: Callable[[SweepSpec, Reduction], list[ClassOrder]],
    steps: int | None,
    output: Path | None,
    *,
    as_json: bool,
) -> int:
    from sweeps import preflight
    from sweeps.certificates import check_place
    from sweeps.collapse import steps_within
    from sweeps.dtypes import with_dtype
    from sweeps.home import Home
    from sweeps.reduction import Reduction
    from sweeps.spec import load_spec

    document, home = with_dtype(load_spec(path)), Home.open()
    if output is not None:
        check_place(output)
    reduction = Reduction.of(document.spec)
    steps = steps_within(document.spec, steps)
    chosen = choose(document.spec, reduction)
    fit = preflight.preflight(document, reduction, home.cache)
    _check_ranks(chosen, fit)
    file = _train(document, home, fit, chosen, steps)
    written = output or home.path / "certificates" / f"{document.spec.name}-{file.sha256[:8]}.json"
    lost: InputError | None = None
    try:
        file.write(written)
    except InputError as error:
        lost = error  # the verdicts at least are not
    if as_json:
        click.echo(json.dumps({"certificate": None if lost else str(written), **_as_json(file)}, indent=2))
    else:
        _print(file)
    if lost:
        raise lost
    if not as_json:
        click.echo(f"certificate   {written}")
        click.echo(f"              `lora-sweeps certify --check {shlex.quote(str(written))}` trains all of it again")
    return 0 if file.holds else 1


def _train(document: SpecDocument, home: Home, fit: Preflight, chosen: list[ClassOrder], steps: int) -> CertificateFile:
    from services.progress import Watcher
    from sweeps import preflight
    from sweeps.certificates import CertificateFile
    from sweeps.reduction import Reduction

    watcher = Watcher()
    n_twins = sum(len(each.twins) for each in chosen)
    watcher.stage(f"training {_counted(len(chosen), 'class', 'es')}, {_counted(n_twins, 'twin')}, {steps} steps each")
    member = preflight.member_bytes(document.spec, Reduction.of(document.spec), fit)
    most = preflight.most_members(document.spec, fit, member)
    with preflight.one_thread():
        file = CertificateFile.make(
            document.spec,
            fit.task,
            chosen,
            steps=steps,
            pack=min(_MOST_BESIDE, most or 1),
            told=partial(watcher.share, "trained"),
            in_float64=preflight.task_loader(home.cache),
        )
    watcher.close()
    return file


def _chosen(
    spec: SweepSpec, reduction: Reduction, *, count: int | None, configurations: tuple[str, ...], twins: tuple[str, ...]
) -> list[ClassOrder]:
    from sweeps.class_choice import choose_classes, claim, name_class

    if twins:
        return [claim(reduction, configurations[0], twins)]
    if configurations:
        # One class may have been named twice.
        named: dict[str, ClassOrder] = {}
        for text in configurations:
            order = name_class(reduction, text)
            named.setdefault(order.class_id, order)
        return list(named.values())
    return choose_classes(spec, reduction, count)


def _check_ranks(classes: list[ClassOrder], fit: Preflight) -> None:
    width = min(min(widths) for widths in fit.layers.values())
    for each in classes:
        if each.representative.rank > width:
            raise InputError(
                f"rank must be at most {width}, the narrowest target layer's; found {each.representative.rank}; "
                "name a smaller rank"
            )


def _check(path: Path, *, as_json: bool) -> int:
    from services.progress import Watcher
    from sweeps import preflight
    from sweeps.certificates import CertificateFile, check, document_of
    from sweeps.class_choice import check_order
    from sweeps.collapse import steps_within
    from sweeps.home import Home
    from sweeps.reduction import Reduction

    file = CertificateFile.read(path)
    document = document_of(file, str(path))
    reduction = Reduction.of(document.spec)
    for order in file.orders:
        check_order(reduction, order)
    cache = Home.open().cache
    steps_within(document.spec, file.steps)
    fit = preflight.preflight(document, reduction, cache)
    _check_ranks(file.orders, fit)
    watcher = Watcher()
    watcher.stage(f"training {_counted(len(file.certificates), 'class', 'es')} again, {file.steps} steps each")
    with preflight.one_thread():
        told = partial(watcher.share, "trained")
        most = preflight.most_members(document.spec, fit, preflight.member_bytes(document.spec, reduction, fit))
        found = check(file, fit.task, told, most_members=most, in_float64=preflight.task_loader(cache))
    watcher.close()
    if as_json:
        verdict = {"held": file.holds, "reproduced": found.reproduced, "changes": list(found.changes)}
        click.echo(json.dumps({"certificate": str(path), **_as_json(found.rerun), **verdict}, indent=2))
    else:
        _print_check(found)
    return 0 if found.holds else 1


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


# -- as JSON -----------------------------------------------------------------------------------------------------------


def _as_json(file: CertificateFile) -> dict[str, Any]:
    return {
        "holds": file.holds,
        "law": file.law.model_dump(),
        "environment": file.environment.model_dump(),
        "steps": file.steps,
        "verdicts": dict(_verdicts(file)),
        "classes": [_class_as_json(certificate) for certificate in file.certificates],
    }


def _class_as_json(certificate: Certificate) -> dict[str, Any]:
    # The representative is a member like the others: what is said of it is of its second run beside the first.
    again = {
        **asdict(certificate.representative),
        "representative": True,
        "exact_in_binary": True,
        "verdict": certificate.repeat,
        "first_difference": None,
        "first_outside": None,
        "max_deviation": 0.0 if certificate.repeat == "bit-identical" else None,
        "envelope": None,
        "horizon": None,
        "in_float64": None,
        "cause": None,
    }
    return {
        "class_id": certificate.class_id,
        "holds": certificate.holds,
        "faults": list(certificate.faults),
        "members": [again, *map(_twin_as_json, certificate.twins)],
    }


def _twin_as_json(twin: TwinVerdict) -> dict[str, Any]:
    return {
        **asdict(twin.configuration),
        "representative": False,
        "exact_in_binary": twin.exact_in_binary,
        "verdict": twin.verdict,
        "first_difference": twin.first_difference,
        "first_outside": twin.first_step,
        "max_deviation": _finite(twin.max_deviation),
        "envelope": _finite(twin.envelope),
        "horizon": twin.horizon,
        "in_float64": twin.in_float64,
        "cause": twin.cause,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _verdicts(file: CertificateFile) -> Counter[str]:
    return Counter(twin.verdict for certificate in file.certificates for twin in certificate.twins)


# -- in words ----------------------------------------------------------------------------------------------------------


def _print(file: CertificateFile) -> None:
    for certificate in file.certificates:
        representative = f"{certificate.representative.label()} at alpha {certificate.representative.alpha:g}"
        twins = "; ".join(_twins_in_words(certificate, file.threshold))
        click.echo(f"{certificate.class_id}  {representative}: {twins}")
        for fault in certificate.faults:
            click.echo(f"    does not hold: {fault}")
        if certificate.holds and certificate.repeat != "bit-identical":
            click.echo("    holds, though training is not deterministic here: a second run was not the same bits")
    held = sum(certificate.holds for certificate in file.certificates)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(_verdicts(file).items()))
    click.echo(f"\nlaw           {file.law.statement}")
    click.echo(f"certificates  {held} of {len(file.certificates)} hold; twins: {counts}")


def _twins_in_words(certificate: Certificate, threshold: float) -> Iterator[str]:
    """`bit-identical at alpha 4, 64`: equal verdicts together."""
    members = [certificate.representative, *(twin.configuration for twin in certificate.twins)]
    uses = Counter(member.alpha for member in members)
    verdicts: dict[str, list[str]] = {}
    for twin in certificate.twins:
        own = twin.configuration
        # With two gauges, or a claim on trial, alpha alone may not tell members apart.
        name = f"{own.alpha:g}" if uses[own.alpha] == 1 else f"{own.alpha:g} ({_apart(own)})"
        verdicts.setdefault(twin.verdict, []).append(name)
    for verdict, names in verdicts.items():
        remarks = _remarks([twin for twin in certificate.twins if twin.verdict == verdict], threshold)
        yield f"{verdict} at alpha {', '.join(names)}" + (f" ({'; '.join(remarks)})" if remarks else "")


def _remarks(twins: list[TwinVerdict], threshold: float) -> list[str]:
    """What there is to say beside the verdict that some twins have in common."""
    said = []
    # One that was heard in float64 is judged there, and its distance here says nothing.
    ratios = [twin.max_ratio for twin in twins if twin.in_float64 is None]
    if ratios and twins[0].verdict == "identical up to rounding":
        said.append(f"at most {max(ratios):.2g} of {threshold:g} envelopes")
    return said + list(dict.fromkeys(remark for twin in twins for remark in twin.reservations))


def _apart(configuration: Configuration) -> str:
    """All digits of a configuration, so that it can be told from one nearby."""
    numbers = {name: value for name, value in asdict(configuration).items() if name not in ("rank", "alpha")}
    standard = {"lr_ratio": 1.0, "weight_decay": 0.0, "head_lr": 0.0}
    return ", ".join(f"{name} {value!r}" for name, value in numbers.items() if value != standard.get(name))


def _print_check(found: Check) -> None:
    _print(found.rerun)
    for change in found.changes:
        click.echo(f"changed       {change}")
    if found.holds:
        verdict = "still holds" if found.recorded.holds else "holds now, though not when it was written"
    else:
        verdict = "no longer holds" if found.recorded.holds else "does not hold, as when it was written"
    same = "every loss and update norm is the recorded one, to the last bit"
    if not found.reproduced:
        same = "its losses and update norms are not the recorded ones to the last bit"
    click.echo(f"check         {verdict}; {same}")
