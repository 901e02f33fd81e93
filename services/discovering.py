"""`lora-sweeps certify SPEC --optimizer package.module:Class`: the law of an optimizer of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sweeps.errors import InputError


def discover(path: Path, optimizer: str, *, configuration: str | None, steps: int | None, as_json: bool) -> int:
    """Looks for the law, prints what was found, and returns the exit code: 0 if there is one, else 1."""
    from services.progress import Watcher
    from sweeps import preflight
    from sweeps.class_choice import read_configuration
    from sweeps.collapse import steps_within
    from sweeps.dtypes import with_dtype
    from sweeps.foreign import find_law_of, load_optimizer, middle_of
    from sweeps.home import Home
    from sweeps.reduction import Reduction
    from sweeps.spec import load_spec

    document = with_dtype(load_spec(path))
    steps = steps_within(document.spec, steps)
    if document.spec.lora.dora:
        raise InputError("the law of an optimizer is looked for without DoRA; found lora.dora: true; set it to false")
    kind = load_optimizer(optimizer)
    reduction, watcher = Reduction.of(document.spec), Watcher()
    chosen = read_configuration(reduction, configuration) if configuration else middle_of(reduction)
    fit = preflight.preflight(document, reduction, Home.open().cache)
    watcher.stage(f"training {chosen.label()} with {kind.name}, {steps} steps")
    with preflight.one_thread():
        found = find_law_of(
            kind,
            document.spec,
            fit.task,
            chosen,
            steps=steps,
            progress=lambda done, text: watcher.count(f"{done:,} {'run' if done == 1 else 'runs'}, {text}"),
        )
    watcher.close()
    if as_json:
        click.echo(json.dumps({"verdict": "bit-identical" if found.powers else "none", **found.as_dict()}, indent=2))
    else:
        click.echo(f"{kind.name}: {found.text}")
        for name, value in found.shifted.items():
            click.echo(f"    {name} was set to {value} for this: at its default it makes no difference here")
        for name, why in found.set_aside.items():
            click.echo(f"    {name}: {why}")
    return 0 if found.powers else 1
