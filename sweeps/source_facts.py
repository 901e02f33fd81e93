"""What a spec's model, data and code look like from one machine: there, the same, or to be had. Downloads nothing.

A directory or a file    its size, and a digest of what tells two of them apart
A hub's id               what is in this machine's cache, and whether the hub would give it
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_MOST_DIGESTED = 16 * 2**20
"""Bytes of a file that are looked at for its digest; its size counts too."""

_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")


@dataclass(frozen=True, slots=True)
class Source:
    """Something that a spec names and every worker reads.

    Attributes:
        use: the key of the spec, such as `task.model`.
        name: an absolute path, or a hub's id.
        kind: what the hub would have under the id.
        revision: of the hub's; None for its latest.
    """

    use: str
    name: str
    kind: Literal["model", "dataset", "code"]
    revision: str | None = None

    @property
    def local(self) -> bool:
        """Whether it is a path."""
        return os.path.isabs(self.name)


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """How a source looks from one machine.

    Attributes:
        there: a path that is there, or all of an id that is in the cache.
        bytes: that it takes; 0 where it is not there.
        digest: equal for equal content, nearly: of names, sizes and small files.
        hub: what the hub said; empty for a path, and where nobody had to ask.
        reachable: whether the hub would give it.
    """

    there: bool
    bytes: int = 0
    digest: str = ""
    hub: str = ""
    reachable: bool = False


def look(sources: tuple[Source, ...]) -> tuple[SourceFacts, ...]:
    """Looks for a spec's sources from this machine."""
    return tuple(_path(one) if one.local else _hub(one) for one in sources)


def _path(source: Source) -> SourceFacts:
    path = Path(source.name)
    if path.is_file():
        return SourceFacts(True, path.stat().st_size, _digest([path], path.parent))
    if not path.is_dir():
        return SourceFacts(False)
    inside = path.glob("*.py") if source.kind == "code" else path.rglob("*")
    files = sorted(one for one in inside if one.is_file() and not one.name.startswith("."))
    return SourceFacts(True, sum(one.stat().st_size for one in files), _digest(files, path))


def _digest(files: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
        if size <= _MOST_DIGESTED:
            digest.update(file.read_bytes())
        else:
            with file.open("rb") as opened:  # a header tells weights apart by their layers; their size does the rest
                digest.update(opened.read(2**20))
    return digest.hexdigest()[:12]


# -- the hub -----------------------------------------------------------------------------------------------------------


def _hub(source: Source) -> SourceFacts:
    try:
        import huggingface_hub
    except ImportError:
        return SourceFacts(False, hub="the package huggingface_hub is not installed")
    if source.kind == "model" and (size := _cached_model(source)) is not None:
        return SourceFacts(True, size)
    if source.kind == "dataset" and _is_cached_data_set(source):
        return SourceFacts(True)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return SourceFacts(False, hub="HF_HUB_OFFLINE tells not to ask the hub")
    api = huggingface_hub.HfApi()
    try:
        if source.kind == "model":
            info = api.model_info(source.name, revision=source.revision, timeout=10, files_metadata=True)
            api.auth_check(source.name)
            return SourceFacts(False, sum(one.size or 0 for one in info.siblings or []), reachable=True)
        api.dataset_info(source.name, revision=source.revision, timeout=10)
        api.auth_check(source.name, repo_type="dataset")
        return SourceFacts(False, reachable=True)
    # The client, and with it what it raises, is another one in other versions of huggingface_hub.
    except Exception as error:
        return SourceFacts(False, hub=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")


def _cached_model(source: Source) -> int | None:
    """Bytes of a model's weights in the cache; None unless all of them are there, and its config."""
    if _cached(source, "config.json") is None:
        return None
    for name in _WEIGHTS:
        found = _cached(source, name)
        if found is None:
            continue
        if name == "model.safetensors":
            return found.stat().st_size
        shards = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
        files = [_cached(source, shard) for shard in shards]
        return sum(file.stat().st_size for file in files if file is not None) if all(files) else None
    return None


def _cached(source: Source, file: str) -> Path | None:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source.name, file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def _is_cached_data_set(source: Source) -> bool:
    import huggingface_hub

    folder = f"datasets--{source.name.replace('/', '--')}"
    return any(Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "snapshots").glob("*/*"))
