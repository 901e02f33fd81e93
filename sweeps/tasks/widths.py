"""How long samples may be, and how wide batches of them are.

suffix  meaning
S       samples
R       rows of a batch: one sample or, packed, several
"""

from __future__ import annotations

from torch import Tensor

from sweeps.errors import TaskError
from sweeps.spec_tasks import DEFAULT_LENGTH, ModelTask

BUCKET = 8
"""Widths of batches are multiples of this: kernels like them, and there are few."""


def padded(width: int) -> int:
    """Width of a batch whose longest row has so many tokens."""
    return -(-width // BUCKET) * BUCKET


def most_rows(train_R: Tensor, held_out_R: Tensor, batch_size: int, at_once: int) -> int:
    """Tokens of the widest batch, in training or in evaluation.

    Args:
        train_R: tokens of each row to train on.
        held_out_R: of each to evaluate on.
        batch_size: rows of a batch in training.
        at_once: tokens that are evaluated at once.
    """
    train, held_out = padded(int(train_R.max())), padded(int(held_out_R.max()))
    return max(batch_size * train, held_out, min(at_once, len(held_out_R) * held_out))


def chunks(widths_R: Tensor, at_once: int) -> list[list[int]]:
    """Rows that are evaluated at once, of rows in the order of their lengths: so many tokens, or one longer row."""
    found: list[list[int]] = []
    for row, width in enumerate(widths_R.tolist()):
        if not found or (len(found[-1]) + 1) * padded(width) > at_once:
            found.append([])
        found[-1].append(row)
    return found


def most_tokens(section: ModelTask, positions: int | None) -> int:
    """The most tokens of a sample, of a model with so many positions; None: it does not say.

    Raises:
        TaskError: the section asks for more than the model has positions for.
    """
    if section.max_length is None:
        return min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    if positions is not None and section.max_length > positions:
        required = f"at most {positions}, the positions that the model has"
        raise TaskError("max_length", required, str(section.max_length))
    return section.max_length


def within(lengths_S: Tensor, section: ModelTask, most: int) -> list[int]:
    """The samples that are not too long.

    Raises:
        TaskError: some are and the section refuses them, or all are and it drops them.
    """
    short: list[int] = (lengths_S <= most).nonzero().flatten().tolist()
    n_long = len(lengths_S) - len(short)
    if n_long and section.too_long == "refuse":
        found = f"{n_long:,} of {len(lengths_S):,} samples longer than {most}, the longest {int(lengths_S.max()):,}"
        way_out = "raise it, or write too_long: truncate or too_long: drop"
        raise TaskError("max_length", "room for every sample", found, way_out)
    if not short and section.too_long == "drop":
        raise TaskError("max_length", "room for some sample", f"all {n_long:,} longer than {most}")
    return short
