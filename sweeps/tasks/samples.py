"""Text samples, from files or through Hugging Face datasets, whose only importer this is.

    file or data set -> Table, rows with columns -> Samples, all of one format

Whatever is wrong with them is a `TaskError` that names the key of the spec, and where in the data.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from sweeps.errors import TaskError
from sweeps.spec_faults import did_you_mean, one_of
from sweeps.spec_tasks import DATA_FILES, DataSource, Format, LabelledData, TextData, label_name
from sweeps.tasks.hub import offline, offline_unless_reachable

_DEFAULT_SHARE = 0.1
_SPLIT_SEED = 0

_COLUMNS_OF: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""What a format needs, in the order in which formats are looked for."""


@dataclass(frozen=True)
class Samples:
    """Samples of one format.

    Attributes:
        format: what a sample is made of.
        values: a tuple a sample: (text,), (prompt, completion) or (messages,); labelled: (text, label) or (text, second
            text, label), the label as it stands in the data.
        source: where they come from, for messages.
        key: of the spec, which says where they come from.
        numbers: each one's place there, counted from 1.
        label_names: of the ids that labels are, where the data set has them.
    """

    format: Format | Literal["labelled"]
    values: Sequence[tuple[Any, ...]]
    source: str
    key: str
    numbers: Sequence[int]
    label_names: tuple[str, ...] | None = None

    @property
    def sha256(self) -> str:
        """Of the content, wherever it lies."""
        digest = hashlib.sha256(self.format.encode())
        for value in self.values:
            digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Sequence[int]) -> Samples:
        """Some of them, in this order."""
        values, numbers = [self.values[i] for i in indices], [self.numbers[i] for i in indices]
        return replace(self, values=values, numbers=numbers)

    def place(self, index: int) -> str:
        """Which one it is, for messages."""
        return f"sample {self.numbers[index]} of {self.source}"


@dataclass(frozen=True)
class _Table:
    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    source: str
    key: str
    classes: Mapping[str, tuple[str, ...]]
    """Names of the ids in a column, where a data set has them."""


def load_samples(data: DataSource) -> tuple[Samples, Samples]:
    """Reads the samples to train on, and those to evaluate on, which may be a share of them that is held out.

    Raises:
        TaskError: no such file, data set, split or column; nothing in it; or something that is no sample.
    """
    train = _samples(_table("train", data.train, data.split, data), data)
    if isinstance(data.eval, str):
        return train, _samples(_table("eval", data.eval, data.eval_split or data.split, data), data)
    if data.eval_split is not None:
        return train, _samples(_table("eval_split", data.train, data.eval_split, data), data)
    if len(train) < 2:
        found = f"one in {train.source}"
        raise TaskError("data.train", "two samples or more, for a share of them is held out", found, "name data.eval")
    share = data.eval if isinstance(data.eval, float) else _DEFAULT_SHARE
    n_held_out = min(len(train) - 1, max(1, round(share * len(train))))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(train)).tolist()
    return train.take(sorted(order[n_held_out:])), train.take(sorted(order[:n_held_out]))


# -- where they are ----------------------------------------------------------------------------------------------------


def _table(key: str, place: str, split: str, data: DataSource) -> _Table:
    path = Path(place)
    if os.path.isfile(place):
        table = _read_file(key, path)
        if split != "train":
            # A file is one split, and it is not clear what the user thinks this is.
            where = "data.eval_split" if key != "train" else "data.split"
            raise TaskError(where, f"none, for {path.name} is a file", split, "name a file for each split")
    elif path.is_absolute() and not os.path.exists(place):
        raise TaskError(f"data.{key}", "a file, or a directory with a data set", f"no such file or directory: {place}")
    else:
        table = _read_data_set(key, place, split, data)
    if not len(table.rows):
        raise TaskError(f"data.{key}", "at least one sample", f"none in {table.source}")
    return table


def _read_file(key: str, path: Path) -> _Table:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise TaskError(f"data.{key}", f"a file that ends with {one_of(DATA_FILES)}", path.name)
    try:
        rows = read(path)
    except UnicodeDecodeError as error:
        found = f"the byte 0x{error.object[error.start]:02x} in {path}"
        raise TaskError(f"data.{key}", "UTF-8 text", found, "save the file as UTF-8") from None
    except (ValueError, OSError, csv.Error) as error:
        raise TaskError(f"data.{key}", f"a {path.suffix.lower()[1:]} file", f"{path}: {error}") from None
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return _Table(rows, columns, str(path), key, {})


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
        wrong = next((i for i, row in enumerate(rows, start=1) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise ValueError(f"entry {wrong} is no object")
        return cast("list[dict[str, Any]]", rows)
    return list(_json_lines(text))


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    # Not splitlines(): JSON text may hold separators that it counts as ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object with columns")
        yield row


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than many a document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        return [{name: value for name, value in row.items() if name is not None} for row in reader]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return cast("list[dict[str, Any]]", pyarrow.parquet.read_table(path).to_pylist())


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_data_set(key: str, place: str, split: str, data: DataSource) -> _Table:
    try:
        import datasets
    except ImportError:
        way_out = "pip install 'lora-sweeps[hf]', or name a file"
        raise TaskError(f"data.{key}", "the package datasets", "it is not installed", way_out) from None
    try:
        if any(os.path.exists(os.path.join(place, name)) for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(place)
        else:
            with nullcontext() if os.path.exists(place) else offline_unless_reachable(datasets.config):
                found = datasets.load_dataset(place, name=data.config)
    # What a hub, a builder or a corrupt file raises has no common root; all of it is about what was asked for.
    except Exception as error:
        required = "a file, a directory that datasets can load, or the id of a data set that can be had from here"
        raise TaskError(f"data.{key}", required, f"{place}: {_first_line(error)}") from None
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if split not in splits:
        where = "data.eval_split" if key != "train" else "data.split"
        raise TaskError(where, f"a split of {place}: {one_of(splits)}", split, did_you_mean(split, splits))
    table = splits[split]
    features = table.features.items()
    classes = {name: tuple(kind.names) for name, kind in features if isinstance(kind, datasets.ClassLabel)}
    return _Table(table, tuple(table.column_names), f"{place}, split {split}", key, classes)


def is_cached(name: str, config: str | None) -> bool:
    """Whether a hub's data set can be loaded on this machine without the hub, as `load_samples` would.

    Files of it in the hub's own cache (`hf download`) do not count: without the hub, datasets takes only what it has
    prepared itself.

    Args:
        name: the data set's id.
        config: of a data set with several configurations, the one that is meant.
    """
    try:
        import datasets
    except ImportError:
        return False
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        with offline(datasets.config):
            datasets.load_dataset_builder(name, name=config)
    # Whatever is raised, `load_samples` would make of it that the data set cannot be had.
    except Exception:
        return False
    finally:
        datasets.logging.set_verbosity(before)
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- what they are -----------------------------------------------------------------------------------------------------


def _samples(table: _Table, data: DataSource) -> Samples:
    form: Format | Literal["labelled"]
    if isinstance(data, LabelledData):
        form, columns = "labelled", _labelled_columns(table, data)
    else:
        assert isinstance(data, TextData)
        form = data.format or _format_of(table, data)
        columns = _COLUMNS_OF[form]
    names = [data.columns.get(column, column) for column in columns]
    if missing := [name for name in names if name not in table.columns]:
        raise _no_columns(f"the column {' and the column '.join(missing)}", table)
    check = _check_labelled if form == "labelled" else _check_unlabelled
    values = []
    for number, row in enumerate(table.rows, start=1):
        for name, column in zip(names, columns, strict=True):
            if (wrong := check(column, row.get(name))) is not None:
                required, found = wrong
                where = f"sample {number} of {table.source}"
                raise TaskError(f"data.{table.key}", f"{required} in the column {name}", f"{found} in {where}")
        values.append(tuple(row[name] for name in names))
    classes = table.classes.get(data.columns.get("label", "label")) if form == "labelled" else None
    if classes is not None:
        values = [(*texts, classes[label] if label in range(len(classes)) else label) for *texts, label in values]
    return Samples(form, values, table.source, f"data.{table.key}", range(1, len(values) + 1), classes)


def _format_of(table: _Table, data: TextData) -> Format:
    for form, columns in _COLUMNS_OF.items():
        if all(data.columns.get(column, column) in table.columns for column in columns):
            return form
    raise _no_columns("columns text, or prompt and completion, or messages", table)


def _labelled_columns(table: _Table, data: LabelledData) -> tuple[str, ...]:
    """A second text where there is one, or where the spec says that there is."""
    has_pairs = "text_pair" in data.columns or "text_pair" in table.columns
    return ("text", "text_pair", "label") if has_pairs else ("text", "label")


def _no_columns(required: str, table: _Table) -> TaskError:
    found = f"{', '.join(table.columns) or 'none'} in {table.source}"
    return TaskError("data.columns", required, found, "say which column it is, such as {text: content}")


def _check_unlabelled(column: str, value: object) -> tuple[str, str] | None:
    """What was required and what was found, where it is not that."""
    if column != "messages":
        return None if isinstance(value, str) else ("text", _kind(value))
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return None
    return "a list of messages, each with role and content,", _kind(value)


def _check_labelled(column: str, value: object) -> tuple[str, str] | None:
    """What was required and what was found, where it is not that."""
    if column == "label":
        return None if label_name(value) is not None else ("a label, which is text or an integer,", _kind(value))
    return None if isinstance(value, str) and value.strip() else ("text that is not empty", _kind(value))


def _kind(value: object) -> str:
    if isinstance(value, str) and not value.strip():
        return "empty text"
    return "nothing" if value is None else "an empty list" if value == [] else f"a value of type {type(value).__name__}"
