"""What a machine has, found out on that machine; judged elsewhere (`sweeps/checkup.py`).

Nodes of a cluster run these functions by name (`nodes.ask`), and the driver does for itself. torch is loaded in a
process of its own: it may hang or die where a GPU's driver is ill, and would keep memory of the GPU.

Nothing is installed, downloaded or left behind. None stands for what could not be found out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_core import __version__
from sweeps.home import own_cache

PACKAGES = ("ray", "torch", "optuna", "mlflow", "numpy", "transformers", "peft", "datasets", "accelerate")
"""Whose versions matter to a sweep; the last four need not be installed."""

_TORCH_S = 90
"""How long torch may take to be loaded and to look for GPUs."""

_LOOK_FOR_GPUS = """
import json, torch
found = []
for i in range(torch.cuda.device_count()):
    one = torch.cuda.get_device_properties(i)
    try:
        free, total = torch.cuda.mem_get_info(i)
    except RuntimeError:
        free, total = None, one.total_memory
    found.append([one.name, total, free])
print(json.dumps([torch.version.cuda or torch.version.hip or "", found]))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it.

    Attributes:
        name: the maker's.
        total_bytes: of its memory.
        free_bytes: of that, not in use by anybody; None where CUDA does not say.
    """

    name: str
    total_bytes: int
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory that is written to, and the file system that it lies on.

    Attributes:
        use: what for.
        path: the directory; the nearest one above it that is there, where it has yet to be made.
        free_bytes: that a user may write; None where the directory cannot be asked.
        total_bytes: of the file system.
        kind: of the file system, as in /proc/mounts; empty where that is not to be known.
        error: why it cannot be written; empty where it can.
    """

    use: str
    path: str
    free_bytes: int | None
    total_bytes: int
    kind: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What one machine has.

    Attributes:
        host: its name.
        versions: of Python, lora-sweeps and `PACKAGES`; empty for what is not installed.
        source: a digest of lora-sweeps' own source, so that two states of one version are told apart.
        gpus: None where torch could not be asked.
        gpu_error: why it could not.
        torch_cuda: the version of CUDA that torch was built for; empty for a build without.
        driver_gpus: that NVIDIA's kernel driver knows; None where there is no such driver.
        visible_devices: CUDA_VISIBLE_DEVICES as the process was started with it; None where it was not set.
        memory_bytes: of the machine, or that its control group may have.
        free_bytes: of that, not in use.
        disks: that lora-sweeps and Ray write to.
        shm_bytes: size of /dev/shm; None where there is none.
        open_files: how many files a process may have open; Ray raises its own limit as far as it may.
        auth_mode: RAY_AUTH_MODE there.
    """

    host: str
    versions: dict[str, str]
    source: str
    gpus: tuple[Gpu, ...] | None
    gpu_error: str
    torch_cuda: str
    driver_gpus: int | None
    visible_devices: str | None
    memory_bytes: int | None
    free_bytes: int | None
    disks: tuple[Disk, ...]
    shm_bytes: int | None
    open_files: int
    auth_mode: str


def gather(directories: Mapping[str, str | None]) -> NodeFacts:
    """Finds out what this machine has.

    Args:
        directories: that a sweep writes to, by their use; None for the cache of a node that does not share that of the
    """
    visible = _first_environment("CUDA_VISIBLE_DEVICES")
    torch_cuda, gpus, gpu_error = _gpus(visible)
    total_bytes, free_bytes = _memory()
    own = {"temporary files": tempfile.gettempdir(), "Ray's session": _ray_directory()}
    shm = Path("/dev/shm")
    return NodeFacts(
        host=socket.gethostname(),
        versions=_versions(),
        source=_source_digest(),
        gpus=gpus,
        gpu_error=gpu_error,
        torch_cuda=torch_cuda,
        driver_gpus=_driver_gpus(),
        visible_devices=visible,
        memory_bytes=total_bytes,
        free_bytes=free_bytes,
        disks=tuple(gather_disk(use, path or str(own_cache())) for use, path in {**directories, **own}.items()),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        open_files=_open_files(),
        auth_mode=os.environ.get("RAY_AUTH_MODE", ""),
    )


def now() -> float:
    """This machine's clock, in seconds."""
    return time.time()


# -- versions ----------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "lora-sweeps": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def _source_digest() -> str:
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for layer in ("lora_core", "sweeps") for path in (root / layer).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


# -- GPUs --------------------------------------------------------------------------------------------------------------


def _gpus(visible: str | None) -> tuple[str, tuple[Gpu, ...] | None, str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible  # Ray may have changed it for the one who asks
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK_FOR_GPUS],
            capture_output=True,
            text=True,
            timeout=_TORCH_S,
            env=environment,
        )
        if done.returncode:
            return "", None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        built_for, found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return "", None, f"torch took more than {_TORCH_S} s to look for GPUs"
    except (OSError, ValueError, IndexError) as error:
        return "", None, str(error)
    return built_for, tuple(Gpu(*one) for one in found), ""


def _driver_gpus() -> int | None:
    known = Path("/proc/driver/nvidia/gpus")
    return len(list(known.iterdir())) if known.is_dir() else None


def _first_environment(name: str) -> str | None:
    """A variable as this process was started with it, whatever was made of it since."""
    for entry in _read("/proc/self/environ").split("\0"):
        key, _, value = entry.partition("=")
        if key == name:
            return value
    return None


# -- memory, disks, limits ---------------------------------------------------------------------------------------------


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory, all and free: the machine's, or its control group's where that has less."""
    lines = [line.split() for line in _read("/proc/meminfo").splitlines()]
    machine = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) > 1}
    total, free = machine.get("MemTotal"), machine.get("MemAvailable")
    for most, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read(most).strip(), _read(used).strip()
        if limit.isdecimal() and usage.isdecimal() and (total is None or int(limit) < total):
            total, left = int(limit), max(0, int(limit) - int(usage))
            free = left if free is None else min(free, left)
    return total, free


def gather_disk(use: str, path: str) -> Disk:
    """Finds out what a directory has, and whether it can be written, by writing to it."""
    place = Path(path).absolute()
    try:
        there = next(one for one in (place, *place.parents) if one.exists())
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Disk(use, str(place), None, 0, "", error.strerror or str(error))
    return Disk(
        use,
        str(there),
        usage.free,
        usage.total,
        file_system(str(there.resolve()), _read("/proc/mounts")),
        _unwritable(there),
    )


def _unwritable(directory: Path) -> str:
    """Why nothing can be written in a directory, found out by writing; empty where it can."""
    try:
        descriptor, probe = tempfile.mkstemp(prefix="lora-sweeps-doctor-", dir=directory)
        try:
            os.write(descriptor, b"written by lora-sweeps doctor")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(probe)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def file_system(path: str, mounts: str) -> str:
    """The kind of file system that an absolute path lies on; empty where the table does not say.

    Args:
        path: without links in it.
        mounts: as in /proc/mounts: device, where, kind, and more; a space is written as `\\040`.
    """
    longest, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        where = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = path == where or path.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= longest:  # the last one mounted there hides those before
            longest, kind = len(where), fields[2]
    return kind


def _ray_directory() -> str:
    """Where Ray keeps its session: a worker of Ray's was told; others do as Ray does."""
    for argument in sys.argv:
        if argument.startswith("--temp-dir="):
            return argument.partition("=")[2]
    return os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray")


def _open_files() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return 65536
    return max(soft, min(hard, 65536))  # as `ray.init` raises it


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
