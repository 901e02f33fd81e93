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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sweeps.errors import TaskError
from sweeps.spec_faults import did_you_mean, one_of
from sweeps.spec_tasks import DATA_FILES, Format, TextData
from sweeps.tasks.hub import offline_unless_reachable

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
        values: a tuple a sample: (text,), (prompt, completion) or (messages,).
        source: where they come from, for messages.
    """

    format: Format
    values: Sequence[tuple[Any, ...]]
    source: str

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
        return Samples(self.format, [self.values[i] for i in indices], self.source)


@dataclass(frozen=True)
class _Table:
    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    source: str
    key: str


def load_samples(data: TextData, *, held_out: bool) -> Samples | None:
    """Reads the samples to train on, or those to evaluate on.

    Args:
        data: the section of the spec.
        held_out: which of the two; None is returned where they are a share of those to train on.

    Raises:
        TaskError: no such file, data set, split or column; nothing in it; or something that is no sample.
    """
    if not held_out:
        return _samples(_table("train", data.train, data.split, data), data)
    if isinstance(data.eval, str):
        return _samples(_table("eval", data.eval, data.eval_split or data.split, data), data)
    if data.eval_split is not None:
        return _samples(_table("eval_split", data.train, data.eval_split, data), data)
    return None


# -- where they are ----------------------------------------------------------------------------------------------------


def _table(key: str, place: str, split: str, data: TextData) -> _Table:
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
    return _Table(rows, columns, str(path), key)


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


def _read_data_set(key: str, place: str, split: str, data: TextData) -> _Table:
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
    return _Table(table, tuple(table.column_names), f"{place}, split {split}", key)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- what they are -----------------------------------------------------------------------------------------------------


def _samples(table: _Table, data: TextData) -> Samples:
    form = data.format or _format_of(table, data)
    names = [data.columns.get(column, column) for column in _COLUMNS_OF[form]]
    if missing := [name for name in names if name not in table.columns]:
        raise _no_columns(f"the column {' and the column '.join(missing)}", table)
    check = _check_messages if form == "messages" else _check_text
    values = []
    for number, row in enumerate(table.rows, start=1):
        for name in names:
            if (wrong := check(row.get(name))) is not None:
                required, found = wrong
                where = f"sample {number} of {table.source}"
                raise TaskError(f"data.{table.key}", f"{required} in the column {name}", f"{found} in {where}")
        values.append(tuple(row[name] for name in names))
    return Samples(form, values, table.source)


def _format_of(table: _Table, data: TextData) -> Format:
    for form, columns in _COLUMNS_OF.items():
        if all(data.columns.get(column, column) in table.columns for column in columns):
            return form
    raise _no_columns("columns text, or prompt and completion, or messages", table)


def _no_columns(required: str, table: _Table) -> TaskError:
    found = f"{', '.join(table.columns) or 'none'} in {table.source}"
    return TaskError("data.columns", required, found, "say which column it is, such as {text: content}")


def _check_text(value: object) -> tuple[str, str] | None:
    """What was required and what was found, where it is not that."""
    return None if isinstance(value, str) else ("text", _kind(value))


def _check_messages(value: object) -> tuple[str, str] | None:
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return None
    return "a list of messages, each with role and content,", _kind(value)


def _kind(value: object) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else f"a value of type {type(value).__name__}"
