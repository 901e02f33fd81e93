"""`lora-sweeps export`: the click command, and what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from services.exports import check_format
from services.options import AS_JSON, SERVER, SWEEP, backend_of
from sweeps.errors import InputError

if TYPE_CHECKING:
    from services.backend import Backend
    from services.schemas import Export

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@click.command()
@SWEEP
@click.option(
    "--format",
    "form",
    metavar="NAME",
    help="A trainer's config: peft, trl, axolotl, llamafactory, unsloth, hf_trainer or loralib.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Directory for --format (default: SWEEP-FORMAT).")
@click.option("--alpha", metavar="NUMBER", help='With this alpha, or by a rule ("2*rank"), and an init scale by hand.')
@click.option("--default-init", is_flag=True, help="With the alpha at which the init scale is 1 (the default).")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="Write the trained adapter for PEFT.")
@click.option("--merge", type=click.Path(path_type=Path), metavar="DIR", help="Write the model, adapter merged in.")
@click.option("--trial", "number", type=int, metavar="NUMBER", help="This trial and not the best one.")
@SERVER
@AS_JSON
def export(
    sweep: str,
    form: str | None,
    output: Path | None,
    alpha: str | None,
    default_init: bool,
    adapter: Path | None,
    merge: Path | None,
    number: int | None,
    server: str | None,
    as_json: bool,
) -> None:
    """Write the best point in a trainer's config format, in the gauge of its default init; or what was trained."""
    if form is None and adapter is None and merge is None:
        raise click.UsageError("export needs something to write: --format NAME, --adapter DIR or --merge DIR.")
    if form is None and (output is not None or alpha is not None or default_init):
        raise click.UsageError("--output, --alpha and --default-init go with --format.")
    if alpha is not None and default_init:
        raise click.UsageError("--alpha and --default-init contradict each other: leave one out.")
    if merge is not None and server is not None:
        raise click.UsageError(
            "--merge needs the model, which a service does not send: take --adapter DIR, and merge it where the model "
            "is (PeftModel.from_pretrained(model, DIR).merge_and_unload())."
        )
    if form is not None:
        check_format(form)
    with backend_of(server) as backend:
        sweep = backend.status(sweep).sweep  # once: `last` may be another one in a moment
        exported = None if form is None else backend.export(sweep, form, alpha=alpha, trial=number)
        files = [] if exported is None else _write(exported, output or Path(f"{sweep}-{form}"))
        if exported is not None:
            for each in exported.leftovers:
                click.echo(f"{'warning' if each.warns else 'note'}: {each.text}", err=True)
        files += _write_trained(backend, sweep, adapter, merge, number)
        if not as_json:
            click.echo("\n".join(map(str, files)))
            return
        printed: dict[str, Any] = {"sweep": sweep, "trial": _number(backend, sweep, number, exported)}
    if exported is not None:
        printed |= exported.model_dump(mode="json", include={"format", "alpha", "init_scale", "leftovers"})
    click.echo(json.dumps(printed | {"files": [str(path) for path in files]}, indent=2))


def _write(exported: Export, directory: Path) -> list[Path]:
    from lora_core.files import write_atomically

    if wrong := [name for name in exported.files if not _NAME.fullmatch(name)]:  # a server is not trusted with paths
        raise InputError(f"an export must have files with plain names; found {wrong[0][:100]!a}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in exported.files.items():
            write_atomically(directory / name, text.encode())
    except OSError as error:
        raise _unwritable("--output", directory, error) from None
    return [directory / name for name in exported.files]


def _write_trained(
    backend: Backend, sweep: str, adapter: Path | None, merge: Path | None, number: int | None
) -> list[Path]:
    files: list[Path] = []
    merged = getattr(backend, "merged", None)  # only where the model is
    for option, directory, write in (("--adapter", adapter, backend.adapter), ("--merge", merge, merged)):
        if directory is not None and write is not None:
            try:
                files += write(sweep, directory, trial=number)
            except OSError as error:
                raise _unwritable(option, directory, error) from None
    return files


def _number(backend: Backend, sweep: str, number: int | None, exported: Export | None) -> int:
    """Of the trial that was exported: a duplicate is the one that was trained in its place."""
    if exported is None:
        exported = backend.export(sweep, "peft", trial=number)  # in which every run can be written
    return exported.trial


def _unwritable(option: str, directory: Path, error: OSError) -> InputError:
    return InputError(f"{option} must be a directory that can be written; {directory} cannot: {error.strerror}")
