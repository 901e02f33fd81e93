"""What memory a machine has, its GPUs' too. Runs on the nodes of a cluster, in processes that train nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may take."""

_LOOK = (
    "import json, torch; "
    "print(json.dumps([torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]))"
)

_LOOK_S = 50


@dataclass(frozen=True, slots=True)
class Memory:
    """What a node has.

    Attributes:
        free_bytes: of its main memory, or of what its container may take of that.
        gpu_bytes: of each GPU, all of it.
    """

    free_bytes: int
    gpu_bytes: tuple[int, ...]


def memory_here(gpus: bool) -> Memory:
    """What memory this machine has.

    Args:
        gpus: whether it has any to look at.
    """
    import psutil

    limits = [int(text) for text in map(_text, _LIMITS) if text.isdigit()]
    return Memory(min([psutil.virtual_memory().available, *limits]), _gpus_here() if gpus else ())


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _gpus_here() -> tuple[int, ...]:
    """Looks at all GPUs of this node, in a process that ends: one that goes on would keep memory of theirs."""
    env = dict(os.environ)
    if not env.get("CUDA_VISIBLE_DEVICES"):
        # Older Rays, and newer ones if they are told to, hide the GPUs from whoever takes none.
        env.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", _LOOK], env=env, capture_output=True, text=True, timeout=_LOOK_S)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "torch saw no GPUs")
    return tuple(json.loads(done.stdout))
