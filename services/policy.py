"""What a spec that was submitted to a server may say: names that the server knows, and nothing that leads elsewhere.

    task.type                  causal_lm, sequence_classification, digits; python by an entrypoint that is allowed
    task.model                 id of a directory under the models' root, with its weights as safetensors
    task.data.train, .eval     id of a file or a directory under the data's root
    task.path, task.revision   not written: modules are installed on the server, and a directory has no revisions
    tracking.uri               not written: the server records in its own MLflow

    id     segments of letters, digits, dots, dashes and underscores: `team/llama` is `<root>/team/llama`
    root   a directory that the administrator set; what is put there is the administrator's to answer for

An id is never decoded, expanded or looked up elsewhere. What it names is followed through symbolic links to where it
really lies, which must be under the root, and the spec then holds that place. Looking takes as long as the file system
does, and reading YAML up to seconds: a server does both where nobody waits for it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from sweeps.spec import SpecDocument, spec_of
from sweeps.spec_faults import Mistake, did_you_mean, one_of, refusal, refuse
from sweeps.spec_tasks import DATA_FILES
from sweeps.yaml_text import clipped, read_yaml, shown

REGISTERED = ("causal_lm", "sequence_classification", "digits")
"""The tasks that everybody may name. One that is not listed here is refused, whatever it would read."""

_WITH_REVISION = ("causal_lm", "sequence_classification")

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_RULE = (
    "letters, digits, dots, dashes and underscores, in segments that begin with none of .- and are joined by single /"
)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of weights that can run code as they are read."""

_MOST_SHOWN = 5
_MOST_ENTRIES = 2_000
"""Of a root, so many entries are looked at for names that could have been meant."""


@dataclass(frozen=True, slots=True)
class Places:
    """What an administrator lets submitted specs name.

    Attributes:
        models: root of the models; None: there are none.
        data: root of the data; None: there is none.
        entrypoints: functions that task python may call, as `package.module:function`, with options that the spec's
            user writes.
    """

    models: Path | None
    data: Path | None
    entrypoints: frozenset[str] = frozenset()


def parse_submitted(text: str, source: str, places: Places) -> SpecDocument:
    """Reads a spec that was submitted to a server; places in it are absolute then, as in a spec from a file.

    Args:
        text: YAML text; not trusted.
        source: the name that messages show; nothing starts from it.
        places: what the spec may name.

    Raises:
        SpecError: the text is no plain YAML, no spec, or says what it may not; every fault at once, in the order of the
            lines.
    """
    yaml = read_yaml(text, source)
    return spec_of(text, yaml, _UnderRoots(places), _refused(yaml.value, places))


def with_ids(text: str, places: Places) -> str:
    """Returns a message with ids in place of the paths under the roots, which are not for users to see."""
    roots = {path for root in (places.models, places.data) if root is not None for path in _names_of(root)}
    # The longest first: a root may lie in the other.
    either = "|".join(re.escape(root) for root in sorted(roots, key=len, reverse=True) if root != os.sep)
    return re.sub(rf"(?<![\w.-])(?:{either}){os.sep}", "", text) if either else text


def _names_of(root: Path) -> tuple[str, str]:
    return os.path.abspath(root), os.path.realpath(root)


# -- what may not be written -------------------------------------------------------------------------------------------


def _refused(raw: object, places: Places) -> Iterator[Mistake]:
    """What a spec says that no submitted spec may say; what is no spec at all is for `spec_of` to tell."""
    task, tracking = (raw.get("task"), raw.get("tracking")) if isinstance(raw, dict) else (None, None)
    if isinstance(task, dict):
        yield from _refused_of_task(task, places)
    if isinstance(tracking, dict) and tracking.get("uri") is not None:
        # Not what was found: it may be a secret.
        hint = "remove it: the server records in its own MLflow; tracking.experiment may name the experiment"
        yield Mistake(("tracking", "uri"), "nothing", "an address", hint)


def _refused_of_task(task: dict[str, object], places: Places) -> Iterator[Mistake]:
    kind, entrypoint = task.get("type"), task.get("entrypoint")
    allowed = (*REGISTERED, "python") if places.entrypoints else REGISTERED
    if isinstance(kind, str) and kind not in allowed:
        ours = "code of yours runs with the local command `lora-sweeps run`, or by an entrypoint that the server allows"
        hint = ours if kind == "python" else did_you_mean(kind, allowed)
        yield Mistake(("task", "type"), one_of(allowed), shown(kind), hint)
    elif kind == "python":
        if isinstance(entrypoint, str) and entrypoint not in places.entrypoints:
            known = sorted(places.entrypoints)
            required = f"an entrypoint that this server allows: {one_of(known)}"
            yield Mistake(("task", "entrypoint"), required, shown(entrypoint), did_you_mean(entrypoint, known))
        if task.get("path") is not None:
            hint = "remove it: the module is installed on the server"
            yield Mistake(("task", "path"), "nothing", shown(task["path"]), hint)
    elif kind in _WITH_REVISION and task.get("revision") is not None:
        hint = "remove it: a server's model is a directory, which has no revisions"
        yield Mistake(("task", "revision"), "nothing", shown(task["revision"]), hint)


# -- where it is -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _UnderRoots:
    """Places are ids under roots; a `Whereabouts` of `sweeps.spec_tasks`."""

    places: Places

    def model(self, name: str) -> str:
        """The directory of a model whose weights are safetensors."""
        root = _Root.of(self.places.models, name, "a model", "models")
        real = root.located(name, os.path.isdir, _is_model)
        _check_model(root, name, real)
        return real

    def data(self, name: str) -> str:
        """A file or a directory."""
        root = _Root.of(self.places.data, name, "a data set", "data")
        return root.located(name, lambda path: os.path.isfile(path) or os.path.isdir(path), _is_data)

    def code(self, name: str | None) -> None:
        """Nowhere: a module must be installed."""


@dataclass(frozen=True, slots=True)
class _Root:
    """A directory that ids are under.

    Attributes:
        path: without symbolic links.
        kind: what is in it, for messages: a model.
        kinds: the same in the plural.
    """

    path: str
    kind: str
    kinds: str

    @classmethod
    def of(cls, path: Path | None, name: str, kind: str, kinds: str) -> _Root:
        if path is None or not os.path.isdir(path):
            required = f"no {kinds}, for this server has none"
            raise refuse(required, name, f"ask its administrator to set its {kinds} directory")
        return cls(os.path.realpath(path), kind, kinds)

    def located(self, name: str, is_one: Callable[[str], bool], is_known: Callable[[os.DirEntry[str]], bool]) -> str:
        """Returns where what an id names really lies.

        Args:
            name: what is written; not trusted.
            is_one: whether a path is of the kind.
            is_known: whether an entry is one to list among what there is.
        """
        if hint := _no_id(name, self.kinds):
            raise refuse(f"the id of {self.kind} of this server: {_RULE}", name, hint)
        real = os.path.realpath(os.path.join(self.path, name))
        required = f"the id of {self.kind} of this server"
        if not self.holds(real):
            raise _refusal(required, f"{shown(name)}, a link that leads out of the server's {self.kinds}")
        if not is_one(real):
            raise refuse(required, name, self.near(name, is_known))
        if link := self._link_out(real):
            raise _refusal(required, f"the link {shown(link)} in it, which leads out of the server's {self.kinds}")
        return real

    def near(self, name: str, is_known: Callable[[os.DirEntry[str]], bool]) -> str:
        """Returns the ids that could have been meant, else some of those that there are."""
        known = sorted(self._known(is_known))
        if not known:
            return f"nothing is fetched from elsewhere, and this server's {self.kinds} directory has none"
        # Comparing is quadratic in the length, and a name this long is no slip of the pen.
        if close := difflib.get_close_matches(name, known, n=3) if len(name) <= 64 else []:
            return f"did you mean {' or '.join(map(repr, close))}?"
        more = ", ..." if len(known) > _MOST_SHOWN else ""
        return f"nothing is fetched from elsewhere; there are {', '.join(known[:_MOST_SHOWN])}{more}"

    def holds(self, real: str) -> bool:
        """Whether a path without symbolic links lies under the root, and is not the root itself."""
        return real.startswith(os.path.join(self.path, ""))

    def _link_out(self, real: str) -> str | None:
        """A symbolic link out of the root in a directory, or in one that it links to."""
        todo, seen = [real], {real}
        while todo:
            for directory, folders, files in os.walk(todo.pop()):
                for entry in (*folders, *files):
                    if not os.path.islink(path := os.path.join(directory, entry)):
                        continue
                    if not self.holds(target := os.path.realpath(path)):
                        return entry
                    if target not in seen:
                        seen.add(target)
                        todo.append(target)
        return None

    def _known(self, is_known: Callable[[os.DirEntry[str]], bool]) -> Iterator[str]:
        """Ids under the root, the shortest first, as far as so many entries go."""
        todo, left = deque([("", self.path)]), _MOST_ENTRIES
        while todo and left:
            prefix, directory = todo.popleft()
            try:
                with os.scandir(directory) as listed:
                    entries = list(islice(listed, left))
            except OSError:
                continue
            left -= len(entries)
            for entry in entries:
                if not _SEGMENT.fullmatch(entry.name) or not self.holds(os.path.realpath(entry.path)):
                    continue
                if is_known(entry):
                    yield prefix + entry.name
                if os.path.isdir(entry.path) and not os.path.islink(entry.path):
                    todo.append((f"{prefix}{entry.name}/", entry.path))


def _no_id(name: str, kinds: str) -> str | None:
    """Why a name is no id, and the way out; None where it is one."""
    if all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        return None
    if "://" in name:
        return f"a server takes {kinds} from its own directory, and fetches nothing"
    if name.startswith(("/", "~", ".")):
        return f"write what it is called under the server's {kinds} directory, without a path to it"
    return "an id is taken as it is written, and nothing in it is decoded or left out"


def _is_model(entry: os.DirEntry[str]) -> bool:
    return os.path.isfile(os.path.join(entry.path, "config.json"))


def _is_data(entry: os.DirEntry[str]) -> bool:
    saved = (os.path.join(entry.path, name) for name in ("state.json", "dataset_dict.json"))
    return entry.name.endswith(DATA_FILES) if os.path.isfile(entry.path) else any(map(os.path.isfile, saved))


# -- what it holds -----------------------------------------------------------------------------------------------------


def _check_model(root: _Root, name: str, real: str) -> None:
    """Checks that a directory is a whole model that can be read without running anything in it."""
    try:
        files = sorted(os.listdir(real))
    except OSError as error:
        raise _refusal("a directory that the server can read", f"{name}: {error.strerror}") from None
    if "adapter_config.json" in files:
        # transformers would put it on the model unasked, and adapters would be trained on what their model is not.
        hint = "merge the adapter into its model"
        raise _refusal("a model without an adapter", f"adapter_config.json in {name}", hint)
    if "config.json" not in files:
        required = f"the id of {root.kind} of this server"
        raise _refusal(required, f"no config.json in {name}", root.near(name, _is_model))
    if any(file.endswith(".safetensors") for file in files):
        return
    required, pickles = "a model with its weights as safetensors", [file for file in files if file.endswith(_PICKLES)]
    if not pickles:
        raise _refusal(required, f"no weights in {name}")
    found = ", ".join(clipped(shown(file)[1:-1]) for file in pickles[:_MOST_SHOWN])
    hint = (
        "such files can run code as they are read, and are never read; transformers' save_pretrained writes safetensors"
    )
    raise _refusal(required, f"{found} in {name}", hint)


def _refusal(required: str, found: str, hint: str | None = None) -> ValidationError:
    """What `refuse` makes, of something found that is no value of the spec."""
    return refusal([Mistake((), required, found, hint)])
