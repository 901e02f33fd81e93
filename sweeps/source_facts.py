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

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weights that are not read: unpickling them could run anything."""

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
_TOKENIZER_ENDINGS = (".model", ".spm", ".tiktoken")
"""Of files by which a tokenizer may be there; some that work on bytes have no vocabulary, but a config only."""


@dataclass(frozen=True, slots=True)
class Source:
    """Something that a spec names and every worker reads.

    Attributes:
        use: the key of the spec, such as `task.model`.
        name: an absolute path, or a hub's id.
        kind: what the hub would have under the id.
        revision: of the hub's; None for its latest.
        config: of a data set with several configurations, the one that is meant.
    """

    use: str
    name: str
    kind: Literal["model", "dataset", "code"]
    revision: str | None = None
    config: str | None = None

    @property
    def local(self) -> bool:
        """Whether it is a path."""
        return os.path.isabs(self.name)


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """How a source looks from one machine.

    Attributes:
        there: a path that is there, or an id that can be loaded from the cache.
        bytes: that it takes; 0 where it is not there.
        digest: equal for equal content, nearly: of names, sizes and small files.
        hub: what the hub said; empty for a path, and where nobody had to ask.
        reachable: whether the hub would give it.
        lacking: what a model has not, there, in the cache or on the hub, without which it cannot be trained.
    """

    there: bool
    bytes: int = 0
    digest: str = ""
    hub: str = ""
    reachable: bool = False
    lacking: str = ""


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
    lacking = _lacking_in(path) if source.kind == "model" else ""
    return SourceFacts(True, sum(one.stat().st_size for one in files), _digest(files, path), lacking=lacking)


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


# -- what a model consists of ------------------------------------------------------------------------------------------


def _lacking_in(directory: Path) -> str:
    """What a model's directory has not; empty where it has all that `sweeps/tasks/pretrained.py` loads."""
    names = {one.name for one in directory.iterdir() if one.is_file()}
    try:
        shards = set() if _INDEX not in names else set(_shards(directory))
    except (OSError, ValueError, LookupError, AttributeError):
        return f"{_INDEX} that can be read"
    return _lacking(names, shards)


def _lacking(names: set[str], shards: set[str]) -> str:
    if "config.json" not in names:
        return "config.json"
    if _WEIGHTS not in names:
        if _INDEX not in names:
            pickled = next((name for name in _PICKLED if name in names), "")
            return "weights in safetensors" + (f", only {pickled}, which is never unpickled" if pickled else "")
        if missing := sorted(shards - names):
            return missing[0] + (f" and {len(missing) - 1} more of its weights" if len(missing) > 1 else "")
    if not any(name in _TOKENIZERS or name.endswith(_TOKENIZER_ENDINGS) for name in names):
        return "tokenizer"
    return ""


def _shards(directory: Path) -> list[str]:
    weights: dict[str, str] = json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(weights.values()))


def _weights_bytes(directory: Path) -> int:
    whole = directory / _WEIGHTS
    files = [whole] if whole.is_file() else [directory / shard for shard in _shards(directory)]
    return sum(file.stat().st_size for file in files)


# -- the hub -----------------------------------------------------------------------------------------------------------


def _hub(source: Source) -> SourceFacts:
    try:
        import huggingface_hub.constants  # not there until something of it was loaded by name
    except ImportError:
        return SourceFacts(False, hub="the package huggingface_hub is not installed")
    lacking = ""
    if source.kind == "model" and (snapshot := _snapshot(source)) is not None:
        if not (lacking := _lacking_in(snapshot)):
            return SourceFacts(True, _weights_bytes(snapshot))
    elif source.kind == "dataset" and _is_prepared(source):
        return SourceFacts(True)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return SourceFacts(False, hub="HF_HUB_OFFLINE tells not to ask the hub", lacking=lacking)
    api = huggingface_hub.HfApi()
    try:
        if source.kind == "model":
            info = api.model_info(source.name, revision=source.revision, timeout=10, files_metadata=True)
            api.auth_check(source.name)
            files = {one.rfilename: one.size or 0 for one in info.siblings or []}
            return SourceFacts(False, sum(files.values()), reachable=True, lacking=_lacking(set(files), set()))
        api.dataset_info(source.name, revision=source.revision, timeout=10)
        api.auth_check(source.name, repo_type="dataset")
        return SourceFacts(False, reachable=True)
    # The client, and with it what it raises, is another one in other versions of huggingface_hub.
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return SourceFacts(False, hub=said, lacking=lacking)


def _snapshot(source: Source) -> Path | None:
    """The directory of a model in the hub's cache; None where it has no config, without which it is none."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def _is_prepared(source: Source) -> bool:
    from sweeps.tasks.samples import is_cached  # loads torch and datasets

    return is_cached(source.name, source.config)
