"""What `doctor` says of facts: rules that touch nothing. Facts are found in `node_facts.py` and `examination.py`.

ok        as it must be
warning   a sweep runs, but not as well, as safely or as reproducibly as it could
failed    a sweep would not run, or would lose something
skipped   could not be looked at, for the reason given; never a silent ok
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sweeps.errors import InputError
from sweeps.node_facts import Disk, NodeFacts
from sweeps.secrecy import hide_passwords
from sweeps.source_facts import Source, SourceFacts

Status = Literal["ok", "warning", "failed", "skipped"]

STATE = "state directory"
"""What a disk is used for that holds the state directory."""

EVERYWHERE = ""
"""The node of a check that is about no node."""

_SAME = ("Python", "lora-sweeps", "ray")
"""Of one version on all nodes, or they do not understand each other."""

_NEEDED = ("ray", "torch", "optuna", "mlflow", "numpy")

_EXTRA = {"transformers", "datasets", "peft", "accelerate"}
"""Of `PACKAGES`, what comes with lora-sweeps[hf]."""

_LARGE_BYTES = 2e9
"""A base model above this trains on a CPU for days."""

_LITTLE_MEMORY, _TOO_LITTLE_MEMORY = 2e9, 0.5e9
_LITTLE_DISK, _TOO_LITTLE_DISK = 5e9, 0.5e9
"""Free bytes below which a node is warned about, and failed: for what a worker has beside its model."""

_FREE = 0.9
"""The share of a GPU's memory that is free where nobody uses it."""

_RAY_FULL = 0.95
"""The share of its file system above which Ray makes no more objects on disk (local_fs_capacity_threshold)."""

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that lora-sweeps starts itself."""

_FEW_FILES = 4096
"""Open files below which Ray warns of broken connections; it recommends 8192."""

_SKEW_WARNING_S, _SKEW_FAILED_S = 1.0, 60.0

_BUCKETS = (
    "fuse.s3fs",
    "fuse.goofys",
    "fuse.gcsfuse",
    "fuse.mount-s3",
    "fuse.mountpoint-s3",
    "fuse.rclone",
    "fuse.geesefs",
)
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "fuse.ceph", "fuse.ceph-fuse", "glusterfs"),
    *("fuse.glusterfs", "beegfs", "fuse.beegfs", "gpfs", "afs", "9p", "fuse.sshfs", "fuse.juicefs", "pvfs2", "wekafs"),
    *("panfs", "fhgfs", "ocfs2", "gfs2", "orangefs"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: see the top of this file.
        found: with units.
        way_out: what to do about a warning or a failure; empty for the others.
        node: where; `EVERYWHERE` for what is about no node.
    """

    name: str
    status: Status
    found: str
    way_out: str = ""
    node: str = EVERYWHERE


@dataclass(frozen=True, slots=True)
class Needs:
    """What a spec asks of its machines.

    Attributes:
        gpus_per_worker: as the spec has it.
        packages: beside those that every sweep needs.
        base_bytes: of the base model's weights; None where they are not known.
        checkpoint_bytes: of all members' states, if no trial were pruned; None where that is not known.
        workers: at most; None for as many as there is room for.
    """

    gpus_per_worker: float | Literal["auto"] = "auto"
    packages: tuple[str, ...] = ()
    base_bytes: int | None = None
    checkpoint_bytes: int | None = None
    workers: int | None = None


def size(n_bytes: float) -> str:
    """Bytes for people."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def counts(checks: Sequence[Check]) -> dict[str, int]:
    """How many checks came out how."""
    return {status: sum(check.status == status for check in checks) for status in get_args(Status)}


def summary(checks: Sequence[Check]) -> str:
    """How the checks came out, in a line."""
    n = counts(checks)
    words = [f"{n['ok']} ok", f"{n['warning']} warning{'' if n['warning'] == 1 else 's'}", f"{n['failed']} failed"]
    words += [f"{n['skipped']} skipped"] if n["skipped"] else []
    return f"{len(checks)} check{'' if len(checks) == 1 else 's'}: {', '.join(words)}"


def refused(name: str, error: Exception, node: str = EVERYWHERE) -> Check:
    """A check that failed with an exception; most of ours end with the way out."""
    # Ray says what it found of versions in lines that an error of ours leaves out.
    versions = str(error.__cause__ or "")
    if "ersion mismatch" in versions:
        way_out = "install the same versions of Ray and Python on all nodes"
        return Check(name, "failed", " ".join(versions.split()), way_out, node)
    text = " ".join(hide_passwords(str(error)).split())
    if not isinstance(error, InputError):
        found = f"{type(error).__name__}: {text}"
        return Check(name, "failed", found, "this was not foreseen: if it does not tell what to do, report it", node)
    required, *pieces = text.split("; ")
    if len(pieces) < 2:
        return Check(name, "failed", text, "start it where it should be, or correct what is named", node)
    return Check(name, "failed", "; ".join([required, *pieces[:-1]]), pieces[-1], node)


def silent(node: str, error: str) -> Check:
    """A node of a cluster that could not be asked what it has."""
    way_out = "see the node's log of Ray; it must have lora-sweeps, in the environment that Ray runs in"
    if "ModuleNotFoundError" in error or "ImportError" in error:
        way_out = "install lora-sweeps there, the driver's version, in the environment that Ray runs in"
    return Check("answers", "failed", error, way_out, node)


# -- versions ----------------------------------------------------------------------------------------------------------


def versions(facts: NodeFacts, node: str, needs: Needs, driver: NodeFacts | None = None) -> Check:
    """Whether all packages are there, and those of the driver where one is given."""
    missing = [name for name in (*_NEEDED, *needs.packages) if not facts.versions.get(name)]
    shown = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version)
    if missing:
        extra = "[hf]" if _EXTRA & set(missing) else ""
        way_out = f"pip install 'lora-sweeps{extra}' there, in the environment that Ray runs in"
        return Check("versions", "failed", f"no {', no '.join(missing)}", way_out, node)
    if driver is None:
        return Check("versions", "ok", shown, node=node)
    other = [
        f"{name} {version or 'missing'} (driver: {driver.versions.get(name) or 'none'})"
        for name, version in facts.versions.items()
        if _public(version) != _public(driver.versions.get(name, ""))
    ]
    if other:
        status: Status = "failed" if any(one.startswith(_SAME) for one in other) else "warning"
        way_out = "install the same versions on all nodes: one image, or one constraints file"
        return Check("versions", status, ", ".join(other), way_out, node)
    if facts.source != driver.source:
        found = f"lora-sweeps {facts.versions['lora-sweeps']} of another state of its source than the driver's"
        return Check("versions", "warning", found, "install the same wheel on all nodes", node)
    return Check("versions", "ok", f"the driver's: {shown}", node=node)


def _public(version: str) -> str:
    """Without what tells builds of a version apart: a head without GPUs may well have torch's CPU build."""
    return version.partition("+")[0]


# -- GPUs and memory ---------------------------------------------------------------------------------------------------


def gpus(facts: NodeFacts, node: str, in_ray: float | None = None) -> Check:
    """Whether torch sees the GPUs that Ray gives away, or where no Ray runs, those that the driver has.

    Args:
        facts: of the node.
        node: its name.
        in_ray: the GPUs that Ray has of it; None where no Ray is asked.
    """
    if facts.gpus is None:
        way_out = "mend torch there: `python -c 'import torch; print(torch.cuda.is_available())'` says more"
        return Check("GPUs", "failed", f"torch cannot look for GPUs: {facts.gpu_error}", way_out, node)
    seen, way_out = len(facts.gpus), _blind(facts)
    if in_ray is not None and in_ray > seen:
        return Check("GPUs", "failed", f"Ray has {in_ray:g}, torch sees {seen}", way_out, node)
    if in_ray is None and (facts.driver_gpus or 0) > seen:
        if facts.visible_devices is not None:
            found = f"{facts.driver_gpus} in the machine, torch sees {seen}"
            return Check("GPUs", "warning", found, way_out, node)
        return Check("GPUs", "failed", f"{facts.driver_gpus} in the machine, torch sees {seen}", way_out, node)
    if not seen:
        return Check("GPUs", "ok", "none: jobs run on the CPU", node=node)
    listed = ", ".join(f"{one.name} with {size(one.total_bytes)}" for one in facts.gpus)
    if in_ray is not None and in_ray < seen:
        way_out = f"start Ray there with --num-gpus={seen}, unless the others are somebody else's"
        return Check("GPUs", "warning", f"torch sees {seen} ({listed}), Ray has {in_ray:g}", way_out, node)
    used = [
        f"{size(one.total_bytes - one.free_bytes)} of GPU {i}"
        for i, one in enumerate(facts.gpus)
        if one.free_bytes is not None and one.free_bytes < _FREE * one.total_bytes
    ]
    if used:
        way_out = "see `nvidia-smi`, and end what uses it; a sweep takes what is free"
        return Check("GPUs", "warning", f"{listed}; in use already: {', '.join(used)}", way_out, node)
    return Check("GPUs", "ok", listed, node=node)


def _blind(facts: NodeFacts) -> str:
    """Why torch may see fewer GPUs than there are, and what to do."""
    torch = facts.versions.get("torch", "")
    if not facts.torch_cuda:
        return f"install a CUDA build of torch there: {torch} has none"
    if facts.visible_devices is not None:
        return (
            f"CUDA_VISIBLE_DEVICES is {facts.visible_devices!r} there: unset it where Ray is started, or name them all"
        )
    if facts.driver_gpus is None:
        return "load NVIDIA's driver there (`nvidia-smi` must list the GPUs); in a container, give it the GPUs"
    return f"NVIDIA's driver there must be new enough for CUDA {facts.torch_cuda}; in a container, give it the GPUs"


def devices(found: dict[str, NodeFacts], needs: Needs) -> list[Check]:
    """Whether what the spec asks for, or its model, wants GPUs where there are none."""
    seen = [gpu for facts in found.values() for gpu in facts.gpus or ()]
    wanted, base = needs.gpus_per_worker, needs.base_bytes
    if not seen:
        if wanted not in ("auto", 0):
            way_out = "use machines with GPUs, or write compute.gpus_per_worker: 0"
            return [Check("devices", "warning", f"no GPU anywhere; a worker asks for {wanted:g}", way_out)]
        if base is not None and base > _LARGE_BYTES:
            found_ = f"no GPU anywhere; the base model takes {size(base)}, and trains slowly on CPUs"
            return [Check("devices", "warning", found_, "use machines with GPUs, or a smaller model")]
        return []
    if base is None or wanted == 0:
        return []
    most, each = max(gpu.total_bytes for gpu in seen), 1.0 if wanted == "auto" else wanted
    room = most * each
    if base >= room:
        found_ = f"the base model takes {size(base)}, a worker has {size(room)} of GPU memory"
        return [Check("devices", "failed", found_, "write more as compute.gpus_per_worker, or use larger GPUs")]
    return [Check("devices", "ok", f"the base model takes {size(base)} of the {size(room)} of a worker's GPU memory")]


def memory(facts: NodeFacts, node: str, needs: Needs, room: int = 1) -> Check:
    """Whether there is memory for the workers, each of which has a base model of its own.

    Args:
        facts: of the node.
        node: its name.
        needs: of the spec.
        room: how many workers the node has room for; 1 where that is not known.
    """
    if facts.memory_bytes is None or facts.free_bytes is None:
        return Check("memory", "skipped", "this system does not say", node=node)
    found = f"{size(facts.free_bytes)} free of {size(facts.memory_bytes)}"
    workers = max(1, room if needs.workers is None else min(room, needs.workers))
    base = workers * (needs.base_bytes or 0)
    takes = f"; the base model takes {size(needs.base_bytes or 0)}"
    takes += f", {size(base)} for {workers} workers" if workers > 1 else ""
    on_cpu = not facts.gpus or needs.gpus_per_worker == 0  # else it is here only while it is loaded
    if base > facts.memory_bytes and on_cpu:
        way_out = "use machines with more memory, or a smaller model"
        if workers > 1:
            way_out += ", or fewer workers: compute.workers, or on a cluster fewer CPUs for Ray there (--num-cpus)"
        return Check("memory", "failed", found + takes, way_out, node)
    if facts.free_bytes < _TOO_LITTLE_MEMORY:
        return Check("memory", "failed", found, "end what takes it, or use a larger machine", node)
    if facts.free_bytes < _LITTLE_MEMORY + base:
        return Check(
            "memory", "warning", found + (takes if base else ""), "end what takes it, or use a larger machine", node
        )
    return Check("memory", "ok", found, node=node)


# -- disks and limits --------------------------------------------------------------------------------------------------


def disk(found: Disk, node: str, *, needed_bytes: int = 0) -> Check:
    """Whether a directory can be written, and has room.

    Args:
        found: the directory.
        node: where.
        needed_bytes: that a sweep would write to it at most.
    """
    name = f"disk: {found.use}"
    if found.error or found.free_bytes is None:
        way_out = "make it writable for the user that lora-sweeps and Ray run as there, or name another directory"
        return Check(name, "failed", f"{found.path}: {found.error or 'cannot be asked'}", way_out, node)
    share = 1 - found.free_bytes / found.total_bytes if found.total_bytes else 0.0
    words = f"{size(found.free_bytes)} free of {size(found.total_bytes)} at {found.path}"
    if needed_bytes:
        words += f"; the spec needs up to {size(needed_bytes)}"
    if found.free_bytes < _TOO_LITTLE_DISK:
        return Check(name, "failed", words, "free some of it, or name a larger one", node)
    if found.free_bytes < max(_LITTLE_DISK, needed_bytes):
        return Check(name, "warning", words, "free some of it, or name a larger one", node)
    if found.use == "Ray's session" and share > _RAY_FULL:
        words += f": {100 * share:.0f} % full, and above 95 % Ray puts no more objects there"
        return Check(name, "warning", words, "free some of it, or start Ray with --temp-dir on a larger disk", node)
    return Check(name, "ok", words, node=node)


def disks(facts: NodeFacts, node: str, *, checkpoint_bytes: int = 0) -> list[Check]:
    """See `disk`, for all directories of a node; what is well on one file system is said in one line.

    Args:
        facts: of the node.
        node: its name.
        checkpoint_bytes: that a sweep would write to the state directory at most.
    """
    checks, well = list[Check](), dict[str, list[str]]()
    for one in facts.disks:
        needed_bytes = checkpoint_bytes if one.use == STATE else 0
        check = disk(one, node, needed_bytes=needed_bytes)
        if check.status != "ok":
            checks.append(check)
            continue
        room = f"{size(one.free_bytes or 0)} free of {size(one.total_bytes)}"
        well.setdefault(room, []).append(one.use + (f" (up to {size(needed_bytes)})" if needed_bytes else ""))
    return [*checks, *(Check("disk", "ok", f"{room} for {', '.join(uses)}", node=node) for room, uses in well.items())]


def shared_memory(facts: NodeFacts, node: str) -> Check:
    """Whether /dev/shm holds Ray's objects."""
    if facts.shm_bytes is None:
        return Check("/dev/shm", "skipped", "this system has none", node=node)
    if facts.shm_bytes < _OBJECT_STORE_BYTES:
        way_out = "in a container: --shm-size=1g for Docker, an emptyDir of medium Memory for Kubernetes"
        return Check("/dev/shm", "warning", f"{size(facts.shm_bytes)}: Ray keeps objects on disk", way_out, node)
    return Check("/dev/shm", "ok", size(facts.shm_bytes), node=node)


def open_files(facts: NodeFacts, node: str) -> Check:
    """Whether Ray may have as many files open as it needs."""
    if facts.open_files < _FEW_FILES:
        way_out = "`ulimit -n 8192` before Ray is started there, or LimitNOFILE= of its unit"
        return Check("open files", "warning", f"{facts.open_files} at most, Ray asks for 4096 or more", way_out, node)
    return Check("open files", "ok", f"{facts.open_files} at most", node=node)


# -- clocks ------------------------------------------------------------------------------------------------------------


def clock(node: str, ahead_s: float, uncertainty_s: float) -> Check:
    """Whether a node's clock goes as the driver's does.

    Args:
        node: the node.
        ahead_s: its clock's lead over the driver's at the middle of the request.
        uncertainty_s: half of the request's round trip.
    """
    found = f"{1e3 * ahead_s:+.0f} ms against the driver's, give or take {1e3 * uncertainty_s:.0f} ms"
    way_out = "let the node's clock be set: `timedatectl set-ntp true`, or chrony"
    off_s = abs(ahead_s) - uncertainty_s
    if off_s > _SKEW_FAILED_S:
        return Check("clock", "failed", found, way_out, node)
    if off_s > _SKEW_WARNING_S:
        return Check("clock", "warning", found, way_out, node)
    if uncertainty_s > _SKEW_FAILED_S:
        return Check("clock", "skipped", f"the node took {2 * uncertainty_s:.0f} s to answer", node=node)
    return Check("clock", "ok", found, node=node)


# -- where state lies --------------------------------------------------------------------------------------------------


def state_file_system(path: str, kind: str, *, sqlite: bool, cluster: bool) -> Check:
    """Whether locks and SQLite work where the state directory lies.

    Args:
        path: of the state directory.
        kind: of its file system; empty where that is not known.
        sqlite: whether the ledger is a file there.
        cluster: whether several machines are to use it.
    """
    name = STATE
    if not kind:
        return Check(name, "skipped", f"{path}: this system does not say what file system it lies on")
    found = f"{path} lies on {kind}"
    if kind in _BUCKETS:
        way_out = "set LORA_SWEEPS_HOME to a file system; checkpoints alone may lie in a bucket, by its URL"
        return Check(name, "failed", f"{found}, a bucket without locks", way_out)
    if kind in _NETWORK and sqlite:
        way_out = "set LORA_SWEEPS_DATABASE_FILE to a file with the URL of a PostgreSQL"
        words = f"{found}, over a network, where SQLite's locks do not hold"
        return Check(name, "failed" if cluster else "warning", words, way_out)
    return Check(name, "ok", found)


def exchanged(node: str, place: str, error: str) -> Check:
    """Whether a node and the driver read what the other has written to the place for checkpoints.

    Args:
        node: the node.
        place: a path or URL.
        error: what was found where they do not; empty where they do.
    """
    name = "checkpoints"
    if error:
        way_out = (
            "set LORA_SWEEPS_HOME to a directory that all nodes share, under one path, or LORA_SWEEPS_CHECKPOINTS "
        )
        way_out += "to a URL such as s3://bucket/path that all of them reach"
        return Check(name, "failed", error, way_out, node)
    return Check(name, "ok", f"{place}: read and written, as the driver sees it", node=node)


# -- what a spec reads -------------------------------------------------------------------------------------------------


def source(one: Source, node: str, found: SourceFacts, driver: SourceFacts | None = None) -> Check:
    """Whether what a spec names is there, or to be had, and the same as at the driver."""
    if found.lacking and (found.there or found.reachable):
        where = "" if one.local else " on the hub"
        way_out = (
            "name a model that is whole: config.json, weights in safetensors and its tokenizer's files, as "
            "transformers' `save_pretrained` writes them"
        )
        return Check(one.use, "failed", f"{one.name}{where} has no {found.lacking}", way_out, node)
    if found.there and one.local:
        if driver is not None and driver.there and found.digest != driver.digest:
            what = f"{one.name} is there, with {size(found.bytes)}, and not as at the driver, {size(driver.bytes)}"
            return Check(one.use, "failed", what, "copy it to all nodes again, or put it on a shared file system", node)
        return Check(one.use, "ok", f"{one.name}, {size(found.bytes)}", node=node)
    if found.there:
        taken = f", {size(found.bytes)}" if found.bytes else ""
        return Check(one.use, "ok", f"{one.name} is in the cache{taken}", node=node)
    if one.local:
        way_out = "put it there under the same path, or on a file system that all nodes share"
        return Check(one.use, "failed", f"{one.name} is not there", way_out, node)
    if found.reachable:
        taken = f" of {size(found.bytes)}" if found.bytes else ""
        return Check(one.use, "ok", f"{one.name} is not in the cache; the hub lets it be downloaded{taken}", node=node)
    way_out = f"download it there (`{_download(one)}`), let the node reach the hub (for a gated one with HF_TOKEN), "
    cached = f"is in the cache without {found.lacking}" if found.lacking else "is not in the cache"
    found_ = f"{one.name} {cached}, and not to be had: {found.hub}"
    return Check(one.use, "failed", found_, way_out + "or name a directory", node)


def _download(one: Source) -> str:
    """The command after which it is in the cache from which it is loaded."""
    if one.kind == "dataset":  # datasets loads nothing from where `hf download` puts it
        names = ", ".join(f"'{name}'" for name in (one.name, one.config) if name)
        return f'python -c "import datasets; datasets.load_dataset({names})"'
    return f"hf download {one.name}{f' --revision {one.revision}' if one.revision else ''}"


# -- who may come in ---------------------------------------------------------------------------------------------------


def token(mode: str, token_path: str, file_mode: int | None, *, in_environment: bool) -> Check:
    """Whether the cluster asks who comes, and the token is its owner's alone.

    Args:
        mode: RAY_AUTH_MODE on all nodes of the cluster; empty where one has another.
        token_path: the file that the token is read from.
        file_mode: of that file; None where there is none.
        in_environment: whether the token came from RAY_AUTH_TOKEN in place of a file.
    """
    if mode != "token":
        way_out = "start Ray with RAY_AUTH_MODE=token on all nodes: whoever reaches it runs code as you"
        return Check("Ray's token", "warning", "the cluster lets anybody in", way_out)
    return token_file(token_path, None if in_environment else file_mode, in_environment=in_environment)


def token_file(path: str, file_mode: int | None, *, in_environment: bool = False) -> Check:
    """Whether a token is its owner's alone."""
    if in_environment:
        return Check("Ray's token", "ok", "asked for; from RAY_AUTH_TOKEN")
    if file_mode is None:
        return Check("Ray's token", "skipped", f"asked for; no file {path} to look at")
    if file_mode & 0o077:
        found = f"{path} has mode {file_mode & 0o777:04o}: others on the machine can read it"
        return Check("Ray's token", "failed", found, f"`chmod 600 {path}`, and make a new one if others were about")
    return Check("Ray's token", "ok", f"{path} has mode {file_mode & 0o777:04o}")
