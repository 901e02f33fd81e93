"""Which classes there are, and which one each sample belongs to.

A label in the data is the name of a class; or its id, where the names of all classes are something else than numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sweeps.errors import TaskError
from sweeps.spec_tasks import label_name
from sweeps.tasks.samples import Samples

_INTEGER = re.compile(r"-?\d+")
_DEFAULT_NAME = re.compile(r"LABEL_\d+")
"""What transformers calls classes that nobody gave names."""

_SHOWN = 10
"""Classes that a message lists."""


def class_names(train: Samples, held_out: Samples, own: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the names of the classes, where the spec does not say them, in the order of their ids.

    Args:
        train: samples to train on.
        held_out: samples to evaluate on.
        own: the model's classes, if it was fine-tuned for some.

    Returns:
        Those of the data set; else the model's, if they are what the samples are labelled with; else the labels of the
        samples, sorted, as numbers where all are.

    Raises:
        TaskError: samples of a single class.
    """
    if train.label_names is not None:
        return train.label_names
    # What is held out of train was part of it, and may have the only samples of a class.
    whole = [train, held_out] if held_out.key == train.key else [train]
    found = {name for samples in whole for name in _names(samples)}
    if own is not None and (found <= set(own) or (not _are_default(own) and found == set(map(str, range(len(own)))))):
        return own
    names = sorted(found, key=int) if all(map(_INTEGER.fullmatch, found)) else sorted(found)
    if len(names) < 2:
        raise _one_class(train, names[0])
    return tuple(names)


def class_ids(samples: Samples, names: Sequence[str]) -> Tensor:
    """Returns the class of each sample [S].

    Raises:
        TaskError: a label that is no class.
    """
    ids = {name: i for i, name in enumerate(names)}
    if not any(map(_INTEGER.fullmatch, names)):
        ids |= {str(i): i for i in range(len(names))}
    found = _names(samples)
    for index, name in enumerate(found):
        if name not in ids:
            more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
            required = f"one of the labels {', '.join(names[:_SHOWN])}{more}"
            way_out = "correct it, or list every label in task.labels"
            raise TaskError(samples.key, required, f"{name} in {samples.place(index)}", way_out)
    return torch.tensor([ids[name] for name in found])


def check_several(train: Samples, classes_S: Tensor, names: Sequence[str]) -> None:
    """Checks that there is something to tell apart.

    Raises:
        TaskError: samples of a single class.
    """
    if len(present := sorted(set(classes_S.tolist()))) < 2:
        raise _one_class(train, names[present[0]])


def check_order(names: Sequence[str], own: tuple[str, ...] | None) -> None:
    """Checks that a model which was fine-tuned for just these classes has them in this order.

    Raises:
        TaskError: it has them in another one, so that its head would take each for another.
    """
    if own is not None and tuple(names) != own and sorted(names) == sorted(own):
        required = f"the order in which the model's own head has them: {', '.join(own)}"
        raise TaskError("labels", required, ", ".join(names), "leave labels out, or write them in that order")


def _names(samples: Samples) -> list[str]:
    names = [label_name(value[-1]) for value in samples.values]
    return [name for name in names if name is not None]  # none is: samples without a label were refused


def _are_default(names: Sequence[str]) -> bool:
    return all(map(_DEFAULT_NAME.fullmatch, names))


def _one_class(train: Samples, name: str) -> TaskError:
    return TaskError(train.key, "samples of two classes or more", f"{name} alone in {train.source}")
