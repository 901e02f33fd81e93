"""Samples -> tokens, which of them are learned, and the rows that they make up. Tokens are cached by content.

suffix  meaning
S       samples
R       rows: what a batch is made of, one sample or, packed, several
T       tokens of all samples, one after the other

name        shape    meaning
ids_T       [T]      tokens
learned_T   [T]      whether a token is predicted from those before it; never a sample's first
starts_S    [S + 1]  where each sample begins in ids_T, and where the last one ends
rows_R      [R + 1]  the first sample of each row, and one past the last
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_core.files import write_atomically
from sweeps.errors import TaskError
from sweeps.tasks.samples import Samples

_VERSION = 1
"""Of the tokens that are made of a sample: caches of another one are not read."""

AT_ONCE = 1000
"""Samples that a tokenizer is given at once."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of samples; see the table above."""

    ids_T: Tensor  # noqa: N815
    learned_T: Tensor  # noqa: N815
    starts_S: Tensor  # noqa: N815

    def __len__(self) -> int:
        return len(self.starts_S) - 1

    @property
    def lengths_S(self) -> Tensor:
        """Tokens of each sample [S]."""
        return self.starts_S.diff()

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Tokens:
        """Joins samples, each given as its tokens and which of them are learned."""
        ids = [i for sample, _ in pairs for i in sample]
        learned = [position > 0 and one for _, flags in pairs for position, one in enumerate(flags)]
        starts = torch.tensor([0, *(len(sample) for sample, _ in pairs)]).cumsum(0)
        return cls(torch.tensor(ids, dtype=torch.int32), torch.tensor(learned, dtype=torch.bool), starts)

    def take(self, indices: Sequence[int], *, most: int | None = None) -> Tokens:
        """Some of the samples, in this order, cut to so many tokens."""
        starts, ids, learned = taken(self.starts_S, indices, self.ids_T, self.learned_T, most=most)
        return Tokens(ids, learned, starts)


def taken(starts_S: Tensor, indices: Sequence[int], *flats_T: Tensor, most: int | None = None) -> list[Tensor]:
    """What begins where, and values of tokens, of some samples: in this order, cut to so many tokens."""
    spans = [(int(starts_S[i]), int(starts_S[i + 1])) for i in indices]
    if most is not None:
        spans = [(start, min(stop, start + most)) for start, stop in spans]
    starts = torch.tensor([0, *(stop - start for start, stop in spans)]).cumsum(0)
    return [starts, *(torch.cat([flat[start:stop] for start, stop in spans]) for flat in flats_T)]


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded at the end to one width.

    Attributes:
        ids: [N, W], 0 where there is nothing.
        targets: [N, W], the token after each where it is learned, else -100.
        positions: [N, W], each token's place in its own sample; None where every row is one sample.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None


@dataclass(frozen=True)
class Rows:
    """What batches are made of.

    Attributes:
        tokens: of the samples, in the order of the rows.
        rows_R: see the table above.
        packed: whether a row may hold several samples.
    """

    tokens: Tokens
    rows_R: Tensor  # noqa: N815
    packed: bool = False

    @classmethod
    def padded(cls, tokens: Tokens) -> Rows:
        """A row a sample."""
        return cls(tokens, torch.arange(len(tokens) + 1))

    @classmethod
    def packed_into(cls, tokens: Tokens, width: int) -> Rows:
        """Rows of at most so many tokens, each with as many samples as fit: longest first, into the fullest row that
        has room."""
        lengths = tokens.lengths_S.tolist()
        contents: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (room, row), ascending
        for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            place = bisect.bisect_left(rooms, (lengths[sample], -1))
            room, row = rooms.pop(place) if place < len(rooms) else (width, len(contents))
            if row == len(contents):
                contents.append([])
            contents[row].append(sample)
            if room > lengths[sample]:
                bisect.insort(rooms, (room - lengths[sample], row))
        order = [sample for row in contents for sample in row]
        rows_R = torch.tensor([0, *(len(row) for row in contents)]).cumsum(0)
        return cls(tokens.take(order), rows_R, packed=True)

    def __len__(self) -> int:
        return len(self.rows_R) - 1

    @property
    def widths_R(self) -> Tensor:
        """Tokens of each row [R]."""
        return self.tokens.starts_S[self.rows_R].diff()

    def batch(self, indices: Sequence[int], *, multiple: int, most: int | None = None) -> Batch:
        """Some rows side by side.

        Args:
            indices: which ones.
            multiple: their width is one of this, so that there are few widths.
            most: a width that is not exceeded for that, if there is one.
        """
        spans = [self._samples_of(row) for row in indices]
        longest = max(row[-1] - row[0] for row in spans)
        width = -(-longest // multiple) * multiple
        width = width if most is None else max(longest, min(width, most))
        ids = torch.zeros(len(spans), width, dtype=torch.int64)
        targets = torch.full((len(spans), width), -100, dtype=torch.int64)
        positions = torch.zeros(len(spans), width, dtype=torch.int64)
        for n, starts in enumerate(spans):
            start, stop = starts[0], starts[-1]
            flat = self.tokens.ids_T[start:stop].long()
            ids[n, : stop - start] = flat
            # Of the token behind: the last has none, and what is behind a packed sample is the first of another.
            targets[n, : stop - start - 1] = torch.where(self.tokens.learned_T[start + 1 : stop], flat[1:], -100)
            # The padding is a sample of its own, so that it sees no other and is seen by none.
            for one, next_one in pairwise([*starts, start + width]):
                positions[n, one - start : next_one - start] = torch.arange(next_one - one)
        return Batch(ids, targets, positions if self.packed else None)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All of it, by name."""
        tokens = self.tokens
        named = {"ids": tokens.ids_T, "learned": tokens.learned_T, "samples": tokens.starts_S, "rows": self.rows_R}
        return {f"{prefix} {name}": tensor for name, tensor in named.items()}

    def _samples_of(self, row: int) -> list[int]:
        """Where the samples of a row begin in the tokens, and where the last one ends."""
        first, last = self.rows_R[row : row + 2].tolist()
        starts: list[int] = self.tokens.starts_S[first : last + 1].tolist()
        return starts


# -- samples to tokens -------------------------------------------------------------------------------------------------


def tokenise(samples: Samples, tokenizer: Any, *, completion_only: bool, cache: Path) -> Tokens:
    """Turns samples into tokens, or takes them from the cache.

    Text and completions end with the tokenizer's end-of-sequence token, where it has one; chats as their template says.

    Args:
        samples: all of one format.
        tokenizer: of transformers.
        completion_only: whether completions alone are learned.
        cache: directory.

    Raises:
        TaskError: completions of samples that have none, or a chat template that is missing or fails.
    """
    if completion_only and samples.format == "text":
        required = "all, for samples of text have no completions"
        raise TaskError("loss", required, f"completion, and {samples.source} has text alone")
    if samples.format == "messages" and not tokenizer.chat_template:
        found = f"a {type(tokenizer).__name__} without one"
        way_out = "use a model that was made for chats, or give the data a column text"
        raise TaskError("model", f"a tokenizer with a chat template, for {samples.source} has messages", found, way_out)

    def make() -> dict[str, Tensor]:
        tokens = Tokens.of(list(_encode(samples, tokenizer, completion_only=completion_only)))
        return {"ids": tokens.ids_T, "learned": tokens.learned_T, "starts": tokens.starts_S}

    key = f"{_VERSION} {sha256_of(tokenizer)} {completion_only} {samples.sha256}"
    tensors = cached(cache, key, ("ids", "learned", "starts"), make)
    return Tokens(tensors["ids"], tensors["learned"], tensors["starts"])


def cached(
    cache: Path, key: str, names: Collection[str], make: Callable[[], dict[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Takes tensors from the cache, or makes them and keeps them there.

    Args:
        cache: directory.
        key: of all that they are made of.
        names: theirs.
        make: makes them.
    """
    path = cache / f"tokens-{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    try:
        kept: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError):
        kept = {}  # it can be made again
    if kept.keys() == set(names):
        return kept
    made = make()
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(made))
    return made


def sha256_of(tokenizer: Any) -> str:
    """Of all of a tokenizer that decides which tokens it makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # How it cut and padded last: each call says that anew.
    rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    own = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()


_Encoded = tuple[list[int], list[bool]]


def _encode(samples: Samples, tokenizer: Any, *, completion_only: bool) -> Iterator[_Encoded]:
    for start in range(0, len(samples), AT_ONCE):
        values = samples.values[start : start + AT_ONCE]
        match samples.format:
            case "text":
                yield from (_all(ids) for ids in _ended(_ids(tokenizer, [text for (text,) in values]), tokenizer))
            case "completion":
                yield from _encode_completions(values, tokenizer, completion_only=completion_only)
            case "messages":
                for index, (messages,) in enumerate(values, start=start):
                    yield _encode_chat(messages, tokenizer, samples.place(index), completion_only=completion_only)


def _encode_completions(
    values: Sequence[tuple[str, str]], tokenizer: Any, *, completion_only: bool
) -> Iterator[_Encoded]:
    # As TRL does: tokenised as one text, and what differs from the prompt alone belongs to the completion, so a token
    # across the border does.
    prompts = _ids(tokenizer, [prompt for prompt, _ in values])
    whole = _ended(_ids(tokenizer, [prompt + completion for prompt, completion in values]), tokenizer)
    for prompt, ids in zip(prompts, whole, strict=True):
        common = _common(prompt, ids) if completion_only else 0
        yield ids, [position >= common for position in range(len(ids))]


def _encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, *, completion_only: bool
) -> _Encoded:
    whole = _render(tokenizer, messages, where)
    (ids,) = _ids(tokenizer, [whole], special=False)
    if not completion_only:
        return _all(ids)
    learned = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], where, prompts=True) if turn else ""
        after = _render(tokenizer, messages[: turn + 1], where)
        if not (whole.startswith(before) and whole.startswith(after)):
            required = "a chat template in which later messages leave earlier ones as they are"
            raise TaskError("loss", required, f"one that does not in {where}", "use loss: all, or one answer a chat")
        start, stop = (_common(part, ids) for part in _ids(tokenizer, [before, after], special=False))
        learned[start:stop] = [True] * (stop - start)
    return ids, learned


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, *, prompts: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompts)
    # A template is a program of its author's, and raises what it likes.
    except Exception as error:
        required = "messages that the tokenizer's chat template takes"
        raise TaskError("data.train", required, f"{where}: {error}") from None
    return text


def _ids(tokenizer: Any, texts: list[str], *, special: bool = True) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _ended(samples: list[list[int]], tokenizer: Any) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    return [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in samples]


def _all(ids: list[int]) -> _Encoded:
    return ids, [True] * len(ids)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they have in common at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(one), len(other)))
