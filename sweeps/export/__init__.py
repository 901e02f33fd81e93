"""A trial in the config format of a trainer: one small file a format, and `FORMATS` lists them.

To add one: a module with `write(point, directory) -> Exported`, its line here, and its row in
`tests/sweeps/test_export_formats.py`, whose suite holds every format to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeps.export import axolotl, hf_trainer, llamafactory, loralib, peft, trl, unsloth
from sweeps.export.parts import Exported
from sweeps.export.point import ExportPoint

FORMATS: dict[str, Callable[[ExportPoint, Path], Exported]] = {
    "peft": peft.write,
    "trl": trl.write,
    "axolotl": axolotl.write,
    "llamafactory": llamafactory.write,
    "unsloth": unsloth.write,
    "hf_trainer": hf_trainer.write,
    "loralib": loralib.write,
}
