"""Scripts of docs/ and examples/ as modules, for tests that hold a page to what its script would write."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType

from tests.support import ROOT


@functools.cache
def script(name: str, folder: str = "docs") -> ModuleType:
    """Returns docs/NAME.py, or that of another folder which is no package."""
    location = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules[location.name] = module  # its dataclasses look themselves up there
    sys.path.insert(0, str(ROOT / folder))  # as for a script that is run
    try:
        location.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / folder))
    return module
