"""Models of Hugging Face transformers with a classification head, fine-tuned to tell to which class a text belongs.

    suffix  meaning
    K       members of a pack
    N       rows of a batch: a text each, or a pair of texts
    M       rows of all members, K times N
    C       classes

Rows are padded at their end and masked; whether a model's answer is then what it is without padding is tried out when
it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from sweeps.errors import TaskError
from sweeps.spec_tasks import SequenceClassificationTask as Section
from sweeps.tasks.classifiers import load_classifier, own_classes, set_up
from sweeps.tasks.labelled import Batch, Labelled, tokenise_labelled
from sweeps.tasks.labels import check_order, check_several, class_ids, class_names
from sweeps.tasks.pretrained import CLASSIFIER, check_vocabulary, load_config, load_tokenizer, most_positions
from sweeps.tasks.samples import load_samples
from sweeps.tasks.spread import device_of_answers
from sweeps.tasks.widths import BUCKET, chunks, most_rows, most_tokens, padded, within

_EVAL_TOKENS = 2048
"""Tokens of a member that are evaluated at once; a longer row goes alone."""


class SequenceClassificationTask:
    """Labelled texts under a frozen model, with a head for their classes."""

    def __init__(
        self,
        model: nn.Module,
        heads: tuple[str, ...],
        train: Labelled,
        held_out: Labelled,
        *,
        padding: int,
        positions: int | None = None,
    ) -> None:
        """Takes a frozen model in evaluation mode, its head, and samples for training and for evaluation.

        Args:
            model: of transformers.
            heads: full names of the modules that are trained whole, beside the adapters.
            train: samples to train on.
            held_out: samples to evaluate on, in the order of their lengths.
            padding: the token that stands where a row has none.
            positions: the most that a row may have, if that is limited.
        """
        self.model = model
        self.heads = heads
        self.lengths_S = train.lengths_S
        """Tokens of each training sample [n_samples], padding not counted."""
        self._train = train
        self._held_out = held_out
        self._padding = padding
        self._positions = positions
        self._device = device_of_answers(model, model.get_submodule(heads[-1]) if heads else None)
        # Others ignore the types that a tokenizer makes, or, as GPT-2, take them for tokens.
        self._has_types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
        self._how = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}

    @classmethod
    def load(
        cls, section: Section, *, cache: Path, device: torch.device, dtype: torch.dtype, seed: int, gpus: int = 1
    ) -> SequenceClassificationTask:
        """Loads the data, which is quicker to be found wanting, and then the model.

        Args:
            section: of the spec.
            cache: where tokens are kept.
            device: for the model.
            dtype: for the model.
            seed: decides what of the head the checkpoint does not have.
            gpus: how many the model is spread over.

        Raises:
            TaskError: the model or the data do not have what the section asks for.
        """
        config = load_config(section, CLASSIFIER)
        tokenizer = load_tokenizer(section.model, section.revision)
        both = train, held_out = load_samples(section.data)
        if len(train.values[0]) != len(held_out.values[0]):
            kinds = ["pairs of texts" if len(each.values[0]) == 3 else "single texts" for each in both]
            raise TaskError(held_out.key, f"{kinds[0]}, as in {train.source}", f"{kinds[1]} in {held_out.source}")
        own = own_classes(config)
        names = section.labels or class_names(train, held_out, own)
        check_order(names, own)
        classes = [class_ids(each, names) for each in both]
        padding = set_up(config, names, tokenizer)
        positions = most_positions(config, CLASSIFIER)
        most = most_tokens(section, positions)
        cut = most if section.too_long == "truncate" else None
        samples = []
        for each, classes_S in zip(both, classes, strict=True):
            tokens = tokenise_labelled(each, classes_S, tokenizer, most=cut, cache=cache)
            samples.append(tokens.take(within(tokens.lengths_S, section, most)))
        check_several(train, samples[0].classes_S, names)
        model, heads = load_classifier(section, config, device=device, dtype=dtype, seed=seed, gpus=gpus)
        check_vocabulary(model, max(int(tokens.ids_T.max()) for tokens in samples))
        # By length, so that a batch has little padding.
        order = samples[1].lengths_S.argsort(stable=True).tolist()
        task = cls(model, heads, samples[0], samples[1].take(order), padding=padding, positions=positions)
        if device.type != "meta":  # else whoever trains tries it out
            task._check_padding()
        return task

    @property
    def n_samples(self) -> int:
        """Samples of the training set."""
        return len(self._train)

    @property
    def data(self) -> dict[str, Tensor]:
        """Tokens of both sets, how they make up samples, and the classes of those."""
        return {**self._train.tensors("train"), **self._held_out.tensors("held-out")}

    def most_rows(self, batch_size: int) -> int:
        """Tokens of the widest batch, in training or in evaluation."""
        return most_rows(self._train.lengths_S, self._held_out.lengths_S, batch_size, _EVAL_TOKENS)

    def losses_K(self, indices: Tensor, members: int) -> Tensor:
        """Mean cross-entropy of each member [K], in nats."""
        batch = self._batch(self._train, indices.tolist())
        return self._nats_M(self._logits_MC(batch, members), batch, members).view(members, -1).mean(dim=1)

    @torch.no_grad()
    def evaluate(self, members: int) -> list[dict[str, float]]:
        """Held-out cross-entropy in nats, accuracy, and the mean of all classes' F1, of each member."""
        sums_K = torch.zeros(members, dtype=torch.float64, device=self._device)
        guesses = []
        for indices in chunks(self._held_out.lengths_S, _EVAL_TOKENS):
            batch = self._batch(self._held_out, indices)
            logits_MC = self._logits_MC(batch, members)
            sums_K += self._nats_M(logits_MC, batch, members).view(members, -1).double().sum(dim=1)
            guesses.append(logits_MC.argmax(dim=1).view(members, -1))
        classes_S, n_classes = self._held_out.classes_S.numpy(), logits_MC.shape[1]
        losses, guesses_KS = (sums_K / len(classes_S)).tolist(), torch.cat(guesses, dim=1).cpu().numpy()
        return [
            {
                "eval/loss": loss,
                "eval/accuracy": float((guesses_S == classes_S).mean()),
                "eval/macro_f1": float(
                    f1_score(classes_S, guesses_S, labels=list(range(n_classes)), average="macro", zero_division=0)
                ),
            }
            for loss, guesses_S in zip(losses, guesses_KS, strict=True)
        ]

    def _batch(self, samples: Labelled, indices: Sequence[int], *, more: int = 0) -> Batch:
        """Samples side by side, with so much more room behind them than a batch would have."""
        longest = int(samples.lengths_S[torch.tensor(indices)].max())
        width = max(longest, min(padded(longest) + more, self._positions or math.inf))
        return samples.batch(indices, width=int(width), padding=self._padding)

    def _logits_MC(self, batch: Batch, members: int) -> Tensor:
        sent = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._has_types:
            sent["token_type_ids"] = batch.types
        logits: Tensor = self.model(
            **{name: one.to(self._device).repeat(members, 1) for name, one in sent.items()}
        ).logits
        # Half precision is for products, and too coarse for a softmax.
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _nats_M(self, logits_MC: Tensor, batch: Batch, members: int) -> Tensor:
        classes_M = batch.classes.to(self._device).repeat(members)
        return nn.functional.cross_entropy(logits_MC, classes_M, reduction="none")

    @torch.no_grad()
    def _check_padding(self) -> None:
        """Refuses a model whose answer depends on the padding behind a sample.

        Raises:
            TaskError: it does.
        """
        shortest, length = [int(self._train.lengths_S.argmin())], int(self._train.lengths_S.min())
        try:
            bare = self._logits_MC(self._train.batch(shortest, width=length, padding=self._padding), 1)
            wide = self._logits_MC(self._batch(self._train, shortest, more=BUCKET), 1)
        # What a model that needs more than text says of itself.
        except (AttributeError, TypeError, ValueError) as error:
            found = f"a {type(self.model).__name__}: {error}"
            raise TaskError("model", "a model that classifies text as it is", found) from None
        # Rounding is that of the model's own precision.
        share = float(torch.finfo(next(self.model.parameters()).dtype).eps) ** 0.5
        if not torch.allclose(bare, wide, rtol=share, atol=share * float(bare.abs().max())):
            required = "a model whose answer does not depend on the padding behind a text"
            raise TaskError("model", required, f"a {type(self.model).__name__} whose answer does")
