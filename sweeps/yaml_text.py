"""Untrusted YAML 1.2 text -> plain Python values, with the line of everything.

Values are built from the parser's events by the YAML 1.2 core schema, and by nothing else: there is no constructor that
a tag could call and no anchor that an alias could expand. What a plain value does not need (tags, anchors, aliases,
`%` directives, several documents) is refused, with its line.

    bounds      why
    1 MiB       the pure-Python parser takes seconds a MiB
    32 levels   counted while the events come, so that nesting cannot exhaust the stack
    20,000      values; a spec has some fifty
    64 bits     of an integer; databases and JSON readers hold no more
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from sweeps.errors import Fault, SpecError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_FAULTS = 50
"""After so many faults the text is not a spec, and reading stops."""

Path = tuple[str | int, ...]
"""Keys and list indices from the root: ("parameters", "rank", "values", 0)."""

# YAML 1.2.2, section 10.3.2, core schema.
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# ruamel.yaml takes time quadratic in the length of a tag (35 s for 1 MiB of "!"), and tags are refused anyway.
_LONG_TAG = re.compile(r"!\S{255}")
_PLAIN_KEY = re.compile(r"[\w./-]{1,64}")


@dataclass(frozen=True, slots=True)
class YamlText:
    """A YAML document that was read.

    Attributes:
        source: the file's name as the user gave it.
        value: dicts with str keys, lists, str, int, finite float, bool and None.
        lines: line of every key and list entry, counted from 1.
    """

    source: str
    value: object
    lines: Mapping[Path, int]

    def line_of(self, path: Path) -> int:
        """Returns the line of a path, or of its nearest parent that is in the text."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]


def dotted(path: Path) -> str:
    """Returns a path as it is shown: `parameters.rank.values[0]`. Keys that would garble a message are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _PLAIN_KEY.fullmatch(part) else shown(part))
    return text


def shown(value: object) -> str:
    """Returns a value as a message shows it: in YAML's words, on one line, 60 characters at most."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            pairs = (f"{dotted((str(key),))}: {shown(item)}" for key, item in islice(value.items(), 20))
            return clipped(f"{{{', '.join(pairs)}}}")
        case list() | tuple():
            return clipped(f"[{', '.join(shown(item) for item in value[:20])}]")
    return clipped(repr(value))


def clipped(text: str) -> str:
    """Returns at most 60 characters of a text, and says where it was cut."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(text: str, source: str) -> YamlText:
    """Reads one YAML 1.2 document.

    Args:
        text: the document; not trusted.
        source: the file's name as the user gave it, for messages.

    Raises:
        SpecError: the text is no YAML, has something in it that a plain value does not need, or passes a bound. Faults
            that do not stop the reading come together.
    """
    reader = _Reader(text, source)
    value = reader.document()
    return YamlText(source, value, MappingProxyType(reader.lines))


class _Reader:
    """Builds the value from the events, and gathers the faults."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.lines: dict[Path, int] = {}
        self._text = text
        self._faults: list[Fault] = []
        self._line = 1
        self._values = 0
        self._events = self._parse()

    def document(self) -> object:
        self._refuse_unreadable()
        next(self._events)  # the start of the stream
        start = next(self._events)
        if not isinstance(start, DocumentStartEvent):
            self._stop((), "a YAML document", "nothing but blanks and comments")
        if start.tags or start.version not in (None, (1, 2)):
            self._fault((), "YAML 1.2 without directives", "a % directive", hint="remove the lines that begin with %")
        root = next(self._events)
        self.lines[()] = self._line
        if isinstance(root, ScalarEvent) and root.value == "" and root.implicit[0]:
            self._stop((), "a YAML document", "an empty one")
        value = self._node(root, (), depth=1)
        next(self._events)  # the end of the document
        if isinstance(next(self._events), DocumentStartEvent):
            self._fault((), "one document", "a second one", hint="remove the line --- or ...")
        if self._faults:
            raise SpecError(self.source, tuple(self._faults))
        return value

    def _refuse_unreadable(self) -> None:
        size_bytes = len(self._text.encode("utf-8", "surrogatepass"))
        if size_bytes > MAX_BYTES:
            self._stop((), f"at most {MAX_BYTES:,} bytes", f"{size_bytes:,}")
        if match := _LONG_TAG.search(self._text):
            self._line = _line_at(self._text, match.start())
            self._stop((), "plain values, without tags", f"the tag {shown(match[0])}")

    def _parse(self) -> Iterator[Any]:
        try:
            for event in YAML(typ="safe", pure=True).parse(self._text):
                self._line = event.start_mark.line + 1
                yield event
        except Exception as error:
            # On malformed text the parser raises AssertionError, ValueError and OverflowError beside its own errors.
            self._stop_at(error)

    def _stop_at(self, error: Exception) -> NoReturn:
        found, hint = "malformed text", None
        if isinstance(error, MarkedYAMLError):
            hint = "look at the indentation here and above" if "block" in (error.context or "") else None
            found = ": ".join(part for part in (error.context, error.problem) if part)
            if mark := error.problem_mark or error.context_mark:
                self._line = mark.line + 1
        elif isinstance(error, ReaderError):
            found = f"the character U+{error.character:04X}"
            self._line = _line_at(self._text, error.position)
        self._stop((), "YAML that can be parsed", _printable(found), hint)

    def _node(self, event: Any, path: Path, depth: int) -> object:
        self._values += 1
        if self._values > MAX_VALUES:
            self._stop(path, f"at most {MAX_VALUES:,} values", "more")
        if depth > MAX_DEPTH:
            self._stop(path, f"at most {MAX_DEPTH} levels of nesting", "more")
        if isinstance(event, AliasEvent):
            self._fault(path, "plain values, without aliases", f"the alias {shown(event.anchor)}", "write it out")
            return None
        if event.anchor is not None:
            self._fault(path, "plain values, without anchors", f"the anchor {shown(event.anchor)}", "remove it")
        if event.tag is not None:
            self._fault(path, "plain values, without tags", f"the tag {shown(event.tag)}", "remove it")
        if isinstance(event, SequenceStartEvent):
            return self._sequence(path, depth)
        if isinstance(event, MappingStartEvent):
            return self._mapping(path, depth)
        return self._scalar(event, path)

    def _sequence(self, path: Path, depth: int) -> list[object]:
        items: list[object] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = self._line
            items.append(self._node(event, here, depth + 1))
        return items

    def _mapping(self, path: Path, depth: int) -> dict[str, object]:
        items: dict[str, object] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            line = self._line
            key = self._node(event, path, depth + 1)
            if not isinstance(key, str):
                self._fault(path, "keys that are text", f"the key {shown(key)}", "put it in quotes", line=line)
                key = str(key)
            here = (*path, key)
            if key in items:
                first = f"a second one; the first is on line {self.lines[here]}"
                self._fault(here, "each key once", first, "remove one of them", line=line)
            self.lines[here] = line
            items[key] = self._node(next(self._events), here, depth + 1)
        return items

    def _scalar(self, event: ScalarEvent, path: Path) -> object:
        text = event.value
        if event.style is not None:
            return self._string(text, path)
        if _NULL.fullmatch(text):
            return None
        if match := _BOOL.fullmatch(text):
            return match[1] is not None
        if _INT.fullmatch(text):
            return self._integer(text, path)
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
            self._fault(path, "finite numbers", clipped(text))
            return None
        return float(text) if _FLOAT.fullmatch(text) else self._string(text, path)

    def _integer(self, text: str, path: Path) -> int | None:
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # The length first: Python's int() refuses very long decimals with an error of its own.
        if len(text) > 64 or not -(2**63) <= (value := int(text, base)) < 2**63:
            self._fault(path, "integers of at most 64 bits", clipped(text))
            return None
        return value

    def _string(self, text: str, path: Path) -> str:
        try:
            # JSON writes characters beyond U+FFFF as two escapes, which come as two surrogates.
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._fault(path, "Unicode text", f"half a character in {shown(text)}")
            return ""

    def _fault(self, path: Path, required: str, found: str, hint: str | None = None, line: int | None = None) -> None:
        self._faults.append(Fault(dotted(path), required, found, line or self._line, hint))
        if len(self._faults) >= MAX_FAULTS:
            raise SpecError(self.source, tuple(self._faults))

    def _stop(self, path: Path, required: str, found: str, hint: str | None = None) -> NoReturn:
        raise SpecError(self.source, (*self._faults, Fault(dotted(path), required, found, self._line, hint)))


def _printable(problem: str) -> str:
    # The parser quotes the text, and the text could garble a terminal.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in problem[:200])


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
