"""Labelled texts, or pairs of texts -> tokens and classes, and batches of them. Tokens are cached by content.

suffix  meaning
S       samples
T       tokens of all samples, one after the other
N, W    rows of a batch, a sample each; tokens of a row, its padding included

name        shape    meaning
ids_T       [T]      tokens, those included that the tokenizer puts around and between texts
types_T     [T]      which of two texts a token belongs to, as the tokenizer counts it; 0 where it does not
starts_S    [S + 1]  where each sample begins in ids_T, and where the last one ends
classes_S   [S]      which class each sample belongs to
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweeps.errors import TaskError
from sweeps.tasks.samples import Samples
from sweeps.tasks.tokens import AT_ONCE, cached, sha256_of, taken

_VERSION = 1
"""Of the tokens that are made of a sample: caches of another one are not read."""


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded at the end to one width.

    Attributes:
        ids: [N, W], the padding token where there is nothing.
        mask: [N, W], 1 for a token and 0 for padding.
        types: [N, W], see the table above.
        classes: [N].
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Labelled:
    """Tokens and classes of samples; see the table above."""

    ids_T: Tensor  # noqa: N815
    types_T: Tensor  # noqa: N815
    starts_S: Tensor  # noqa: N815
    classes_S: Tensor  # noqa: N815

    def __len__(self) -> int:
        return len(self.classes_S)

    @property
    def lengths_S(self) -> Tensor:
        """Tokens of each sample [S]."""
        return self.starts_S.diff()

    def take(self, indices: Sequence[int]) -> Labelled:
        """Some of the samples, in this order."""
        starts, ids, types = taken(self.starts_S, indices, self.ids_T, self.types_T)
        return Labelled(ids, types, starts, self.classes_S[torch.tensor(indices)])

    def batch(self, indices: Sequence[int], *, width: int, padding: int) -> Batch:
        """Some samples side by side.

        Args:
            indices: which ones.
            width: tokens of a row, at least those of the longest sample.
            padding: the token that stands where there is nothing.
        """
        spans = [self.starts_S[i : i + 2].tolist() for i in indices]
        ids = torch.full((len(spans), width), padding)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for n, (start, stop) in enumerate(spans):
            ids[n, : stop - start] = self.ids_T[start:stop]
            types[n, : stop - start] = self.types_T[start:stop]
            mask[n, : stop - start] = 1
        return Batch(ids, mask, types, self.classes_S[torch.tensor(indices)])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All of it, by name."""
        named = {"ids": self.ids_T, "types": self.types_T, "samples": self.starts_S, "classes": self.classes_S}
        return {f"{prefix} {name}": tensor for name, tensor in named.items()}


def tokenise_labelled(
    samples: Samples, classes_S: Tensor, tokenizer: Any, *, most: int | None, cache: Path
) -> Labelled:
    """Turns samples into tokens, or takes them from the cache.

    Args:
        samples: labelled.
        classes_S: theirs.
        tokenizer: of transformers; it makes one sequence of two texts as it does for its model.
        most: longer samples are cut to so many tokens, of two texts the longer one first; None: nothing is cut.
        cache: directory.

    Raises:
        TaskError: a sample that has no tokens, or no room for a token of a text.
    """
    _check_room(samples, tokenizer, most)

    def make() -> dict[str, Tensor]:
        pairs = list(_encode(samples, tokenizer, most))
        if (empty := next((i for i, (ids, _) in enumerate(pairs) if not ids), None)) is not None:
            raise TaskError(samples.key, "a token in every sample", f"none in {samples.place(empty)}", "remove it")
        starts = torch.tensor([0, *(len(ids) for ids, _ in pairs)]).cumsum(0)
        ids = torch.tensor([i for ids, _ in pairs for i in ids], dtype=torch.int32)
        return {"ids": ids, "types": torch.tensor([t for _, types in pairs for t in types]).byte(), "starts": starts}

    cut = None if most is None else (most, tokenizer.truncation_side)
    key = f"labelled {_VERSION} {sha256_of(tokenizer)} {cut} {samples.sha256}"
    tensors = cached(cache, key, ("ids", "types", "starts"), make)
    return Labelled(tensors["ids"], tensors["types"], tensors["starts"], classes_S)


def _check_room(samples: Samples, tokenizer: Any, most: int | None) -> None:
    n_texts = len(samples.values[0]) - 1
    around = tokenizer.num_special_tokens_to_add(pair=n_texts == 2)
    if most is not None and most < around + n_texts:
        required = f"at least {around + n_texts}, for {around} of a sample's tokens are the tokenizer's own"
        raise TaskError("max_length", required, str(most))


def _encode(samples: Samples, tokenizer: Any, most: int | None) -> Iterator[tuple[list[int], list[int]]]:
    how = {} if most is None else {"truncation": "longest_first", "max_length": most}
    for start in range(0, len(samples), AT_ONCE):
        texts = [value[:-1] for value in samples.values[start : start + AT_ONCE]]
        made = tokenizer(*map(list, zip(*texts, strict=True)), verbose=False, **how)
        types = made.get("token_type_ids") or [[0] * len(ids) for ids in made["input_ids"]]
        yield from zip(made["input_ids"], types, strict=True)
