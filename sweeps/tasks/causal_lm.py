"""Causal language models of Hugging Face transformers, fine-tuned on text.

    suffix  meaning
    K       members of a pack
    N       rows of a batch: a sample each or, packed, several
    W       tokens of a row, its padding included
    V       tokens of the vocabulary

Rows are padded at their end, so causal attention needs no mask: no token sees the padding behind it. Packed rows are
told apart by their position ids, from which transformers makes the mask; whether a model does is tried out when it is
loaded.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from sweeps.errors import TaskError
from sweeps.spec_tasks import CausalLmTask as Section
from sweeps.tasks.pretrained import (
    CAUSAL_LM,
    check_vocabulary,
    load_causal_lm,
    load_config,
    load_tokenizer,
    most_positions,
    small_causal_lm,
    vocabulary,
)
from sweeps.tasks.samples import load_samples
from sweeps.tasks.spread import device_of_answers
from sweeps.tasks.tokens import Batch, Rows, Tokens, tokenise
from sweeps.tasks.widths import BUCKET, chunks, most_rows, most_tokens, within

_EVAL_TOKENS = 2048
"""Tokens of a member that are evaluated at once; a longer row goes alone."""

_MOST_PERPLEXITY_NATS = 700.0
"""exp() of more is infinite in float64."""


class CausalLmTask:
    """Text under a frozen language model."""

    def __init__(self, model: nn.Module, train: Rows, held_out: Rows, positions: int | None = None) -> None:
        """Takes a frozen model in evaluation mode, rows for training and for evaluation, and the most tokens that a row
        may have, if that is limited."""
        self.model = model
        self._positions = positions
        self._train = train
        self._held_out = held_out
        ends = getattr(model, "get_output_embeddings", None)
        self._device = device_of_answers(model, ends() if ends else None)
        self.lengths_S = train.widths_R
        """Tokens of each row of the training set [n_samples], padding not counted."""

    @classmethod
    def load(
        cls, section: Section, *, cache: Path, device: torch.device, dtype: torch.dtype, gpus: int = 1
    ) -> CausalLmTask:
        """Loads the data, which is quicker to be found wanting, and then the model; see `load_causal_lm`.

        Raises:
            TaskError: the model or the data do not have what the section asks for.
        """
        positions = most_positions(load_config(section, CAUSAL_LM), CAUSAL_LM)
        most = most_tokens(section, positions)
        tokenizer = load_tokenizer(section.model, section.revision)
        train, held_out = load_samples(section.data)
        only = section.loss == "completion"
        tokens = [
            _fitting(tokenise(each, tokenizer, completion_only=only, cache=cache), section, most)
            for each in (train, held_out)
        ]
        model = load_causal_lm(section, device=device, dtype=dtype, gpus=gpus)
        check_vocabulary(model, max(int(each.ids_T.max()) for each in tokens))
        if section.packing:
            tried = small_causal_lm(section) if device.type == "meta" else model
            if tried is not None:  # else whoever trains tries it out
                _check_apart(tried, section)
            rows = Rows.packed_into(tokens[0], most)
        else:
            rows = Rows.padded(tokens[0])
        # By length, so that a batch has little padding.
        order = tokens[1].lengths_S.argsort(stable=True).tolist()
        return cls(model, rows, Rows.padded(tokens[1].take(order)), positions)

    @property
    def n_samples(self) -> int:
        """Rows of the training set."""
        return len(self._train)

    @property
    def data(self) -> dict[str, Tensor]:
        """Tokens of both sets, which of them are learned, and how they make up samples and rows."""
        return {**self._train.tensors("train"), **self._held_out.tensors("held-out")}

    def most_rows(self, batch_size: int) -> int:
        """Tokens of the widest batch, in training or in evaluation."""
        return most_rows(self._train.widths_R, self._held_out.widths_R, batch_size, _EVAL_TOKENS)

    def losses_K(self, indices: Tensor, members: int) -> Tensor:
        """Mean of each member's losses over the learned tokens of the batch [K], in nats."""
        batch = self._train.batch(indices.tolist(), multiple=BUCKET, most=self._positions)
        nats_KNW, learned = self._nats_KNW(batch, members)
        return nats_KNW.sum(dim=(1, 2)) / learned

    @torch.no_grad()
    def evaluate(self, members: int) -> list[dict[str, float]]:
        """Mean nats a learned token of the held-out set, and their exponential, of each member."""
        sums_K, learned = torch.zeros(members, dtype=torch.float64, device=self._device), 0
        for indices in self._chunks():
            batch = self._held_out.batch(indices, multiple=BUCKET, most=self._positions)
            nats_KNW, in_chunk = self._nats_KNW(batch, members)
            sums_K += nats_KNW.double().sum(dim=(1, 2))
            learned += in_chunk
        means = (sums_K / learned).tolist()
        return [{"eval/loss": mean, "eval/perplexity": math.exp(min(mean, _MOST_PERPLEXITY_NATS))} for mean in means]

    def _nats_KNW(self, batch: Batch, members: int) -> tuple[Tensor, int]:
        """The loss at each token [K, N, W], 0 where nothing is learned, and how many tokens of a member are."""
        ids, targets = batch.ids.to(self._device), batch.targets.to(self._device)
        positions = {}
        if batch.positions is not None:
            positions["position_ids"] = batch.positions.to(self._device).repeat(members, 1)
        logits = self.model(input_ids=ids.repeat(members, 1), use_cache=False, **positions).logits
        # Half precision is for products; a softmax over a vocabulary in it would be off by a tenth of a nat.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        flat = targets.repeat(members, 1).flatten()
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction="none", ignore_index=-100)
        return nats.view(members, *targets.shape), int((batch.targets != -100).sum())

    def _chunks(self) -> list[list[int]]:
        """Rows that are evaluated at once."""
        return chunks(self._held_out.widths_R, _EVAL_TOKENS)


def _fitting(tokens: Tokens, section: Section, most: int) -> Tokens:
    """The samples that fit, each with something to learn."""
    short = within(tokens.lengths_S, section, most)
    if len(short) < len(tokens):
        tokens = tokens.take(short) if section.too_long == "drop" else tokens.take(range(len(tokens)), most=most)
    learned = torch.cat([torch.zeros(1, dtype=torch.int64), tokens.learned_T.cumsum(0)])[tokens.starts_S].diff()
    if n_empty := int((learned == 0).sum()):
        first = int((learned == 0).nonzero()[0]) + 1
        found = f"none in {n_empty:,} of {len(tokens):,} samples, the first of them sample {first}"
        way_out = "remove them" if section.too_long != "truncate" else "remove them, or raise max_length"
        raise TaskError("data.train", "a token to learn in every sample", found, way_out)
    return tokens


@torch.no_grad()
def _check_apart(model: nn.Module, section: Section) -> None:
    """Refuses to pack for a model that does not tell packed samples apart.

    Raises:
        TaskError: what a token sees depends on a sample beside its own.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2, device=device)
    # The same second sample, after two different first ones.
    ids = torch.tensor([[1, 2, 3, 0, 2, 1, 0, 3], [3, 0, 1, 2, 2, 1, 0, 3]], device=device)
    try:
        one, other = model(input_ids=ids % vocabulary(model), position_ids=positions, use_cache=False).logits[:, 4:]
    except TypeError as error:
        required = "false, for this model takes no position ids, by which packed samples are told apart"
        raise TaskError("packing", required, f"true, and {error}") from None
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        required = "false, for this model and its attention do not keep packed samples apart"
        raise TaskError("packing", required, "true", "or try another task.attention")
