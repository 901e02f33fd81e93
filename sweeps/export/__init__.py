"""The best point in the config format of a trainer: one small file a format, and `FORMATS` lists them.

To add one: a module with `write(point, directory) -> list of the files it wrote`, and its line here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeps.export import peft
from sweeps.export.point import ExportPoint

FORMATS: dict[str, Callable[[ExportPoint, Path], list[Path]]] = {
    "peft": peft.write,
}
