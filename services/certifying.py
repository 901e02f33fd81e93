"""`lora-sweeps certify`: trains twins, writes certificates, and checks those that others wrote."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sweeps.errors import InputError

if TYPE_CHECKING:
    from sweeps.certificates import CertificateFile, Check
    from sweeps.certifying import ClassOrder
    from sweeps.collapse import Certificate
    from sweeps.reduction import Reduction
    from sweeps.spec import SweepSpec

_MOST_BESIDE = 64
"""Classes in a pack, if memory holds them."""


@click.command()
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@click.option("--classes", metavar="all|N", default="all", help="How many classes to certify (default: all).")
@click.option("--configuration", metavar="rank=8,alpha=16,lr=1e-3", multiple=True, help="Certify this one's class.")
@click.option(
    "--twin", metavar="rank=8,alpha=64,lr=5e-4", multiple=True, help="Put a claim on trial: is this its twin?"
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each run (default: the spec's certify.steps).")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write the certificate.")
@click.option("--check", type=click.Path(path_type=Path), help="Train all of a certificate again; takes no SPEC.")
@click.option("--optimizer", metavar="PACKAGE.MODULE:CLASS", help="Find the law of an optimizer of your own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def certify(
    spec: Path | None,
    classes: str,
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
        if configuration or steps or output or optimizer or classes != "all":
            raise click.UsageError("--check trains what the certificate says, and takes --json only.")
        sys.exit(_check(check, as_json=as_json))
    assert spec is not None
    if optimizer is not None:
        from services.discovering import discover

        if twin or output or classes != "all" or len(configuration) > 1:
            raise click.UsageError("--optimizer goes with --steps, --json and at most one --configuration.")
        sys.exit(discover(spec, optimizer, configuration=next(iter(configuration), None), steps=steps, as_json=as_json))
    sys.exit(_certify(spec, _count(classes), configuration, twin, steps, output, as_json=as_json))


def _count(classes: str) -> int | None:
    if classes == "all":
        return None
    if not classes.isdecimal() or int(classes) < 1:
        raise InputError(f"--classes must be all or a number of at least 1; found {classes!r}")
    return int(classes)


def _certify(
    path: Path,
    count: int | None,
    configurations: tuple[str, ...],
    twins: tuple[str, ...],
    steps: int | None,
    output: Path | None,
    *,
    as_json: bool,
) -> int:
    from services.output import Watcher
    from sweeps import preflight
    from sweeps.certificates import CertificateFile
    from sweeps.collapse import steps_within
    from sweeps.home import Home
    from sweeps.reduction import Reduction
    from sweeps.spec import load_spec

    document, home, watcher = load_spec(path), Home.open(), Watcher()
    reduction = Reduction.of(document.spec)
    steps = steps_within(document.spec, steps)
    chosen = _chosen(document.spec, reduction, count, configurations, twins)
    fit = preflight.preflight(document, reduction, home.cache)
    _check_ranks(chosen, fit)
    pack = min(_MOST_BESIDE, preflight.most_members(document.spec, fit))
    watcher.stage(
        f"training {len(chosen)} classes, {sum(len(each.twins) for each in chosen)} twins, {steps} steps each"
    )
    with preflight.one_thread():
        file = CertificateFile.make(
            document.spec,
            fit.task,
            chosen,
            steps=steps,
            pack=pack,
            told=lambda done, of: watcher.share("trained", done, of),
        )
    watcher.close()
    written = output or home.path / "certificates" / f"{document.spec.name}-{file.sha256[:8]}.json"
    file.write(written)
    if as_json:
        click.echo(json.dumps({"certificate": str(written), **_as_json(file)}, indent=2))
    else:
        _print(file)
        click.echo(
            f"certificate   {written}\n              `lora-sweeps certify --check {written}` trains all of it again"
        )
    return 0 if file.holds else 1


def _chosen(
    spec: SweepSpec,
    reduction: Reduction,
    count: int | None,
    configurations: tuple[str, ...],
    twins: tuple[str, ...],
) -> list[ClassOrder]:
    from sweeps.class_choice import choose_classes, claim, name_class

    if twins:
        return [claim(reduction, configurations[0], twins)]
    if configurations:
        return [name_class(reduction, text) for text in configurations]
    return choose_classes(spec, reduction, count)


def _check_ranks(classes: list[ClassOrder], fit: Any) -> None:
    width = min(min(widths) for widths in fit.layers.values())
    for each in classes:
        if each.representative.rank > width:
            raise InputError(
                f"rank must be at most {width}, the narrowest target layer's; found {each.representative.rank}"
            )


def _check(path: Path, *, as_json: bool) -> int:
    import torch

    from services.output import Watcher
    from sweeps import preflight
    from sweeps.certificates import CertificateFile, check, spec_of
    from sweeps.home import Home
    from sweeps.tasks import load_task

    file, watcher = CertificateFile.read(path), Watcher()
    task = load_task(spec_of(file), cache=Home.open().cache, device=torch.device("cpu"))
    watcher.stage(f"training {len(file.certificates)} classes again")
    with preflight.one_thread():
        found = check(file, task, lambda done, of: watcher.share("trained", done, of))
    watcher.close()
    if as_json:
        verdict = {"holds": found.holds, "reproduced": found.reproduced, "changes": list(found.changes)}
        click.echo(json.dumps({"certificate": str(path), **_as_json(found.rerun), **verdict}, indent=2))
    else:
        _print_check(found)
    return 0 if found.holds else 1


# -- as JSON -----------------------------------------------------------------------------------------------------------


def _as_json(file: CertificateFile) -> dict[str, Any]:
    return {
        "holds": file.holds,
        "law": file.law.model_dump(),
        "environment": file.environment.model_dump(),
        "steps": file.certificates[0].steps if file.certificates else 0,
        "verdicts": dict(_verdicts(file)),
        "classes": [_class_as_json(certificate) for certificate in file.certificates],
    }


def _class_as_json(certificate: Certificate) -> dict[str, Any]:
    # The representative is a member like the others: what is said of it is of its second run beside the first.
    again = {
        **_configuration(certificate.representative),
        "representative": True,
        "exact_in_binary": True,
        "verdict": certificate.repeat,
        "first_difference": None,
        "first_outside": None,
        "max_deviation": 0.0,
        "envelope": None,
        "horizon": None,
        "cause": None,
    }
    members = [
        {
            **_configuration(twin.configuration),
            "representative": False,
            "exact_in_binary": twin.exact_in_binary,
            "verdict": twin.verdict,
            "first_difference": twin.first_difference,
            "first_outside": twin.first_step,
            "max_deviation": _finite(twin.max_deviation),
            "envelope": _finite(twin.envelope),
            "horizon": twin.horizon,
            "cause": twin.cause,
        }
        for twin in certificate.twins
    ]
    return {
        "class_id": certificate.class_id,
        "holds": certificate.holds,
        "faults": list(certificate.faults),
        "members": [again, *members],
    }


def _configuration(configuration: Any) -> dict[str, Any]:
    return asdict(configuration)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _verdicts(file: CertificateFile) -> Counter[str]:
    return Counter(twin.verdict for certificate in file.certificates for twin in certificate.twins)


# -- in words ----------------------------------------------------------------------------------------------------------


def _print(file: CertificateFile) -> None:
    for certificate in file.certificates:
        click.echo(f"{certificate.class_id}  {certificate.representative.label()} at alpha "
                   f"{certificate.representative.alpha:g}: {'; '.join(_twins_in_words(certificate))}")  # fmt: skip
        for fault in certificate.faults:
            click.echo(f"    does not hold: {fault}")
    held = sum(certificate.holds for certificate in file.certificates)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(_verdicts(file).items()))
    click.echo(f"\nlaw           {file.law.statement}")
    click.echo(f"classes       {held} of {len(file.certificates)} collapse; twins: {counts}")


def _twins_in_words(certificate: Certificate) -> Iterator[str]:
    """`bit-identical at alpha 4, 64`: equal verdicts together."""
    verdicts: dict[str, list[str]] = {}
    for twin in certificate.twins:
        verdicts.setdefault(twin.verdict, []).append(f"{twin.configuration.alpha:g}")
    farthest = max(
        (twin.max_ratio for twin in certificate.twins if twin.verdict == "identical up to rounding"), default=0
    )
    for verdict, alphas in verdicts.items():
        distance = f" (at most {farthest:.2g} of 10 envelopes)" if verdict == "identical up to rounding" else ""
        yield f"{verdict} at alpha {', '.join(alphas)}{distance}"


def _print_check(found: Check) -> None:
    _print(found.rerun)
    for change in found.changes:
        click.echo(f"changed       {change}")
    if found.holds and found.reproduced:
        click.echo("still holds   every loss and every update norm is the recorded one, to the last bit")
    elif found.holds:
        click.echo("still holds   the runs themselves are not the recorded ones to the last bit")
    else:
        click.echo("no longer holds")
