"""What `train.dtype: auto` is: found out once, before anything is made, so that ledger, certificates and exports have
the number format by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from sweeps.errors import TaskError
from sweeps.spec import SpecDocument
from sweeps.spec_sections import Dtype


def with_dtype(document: SpecDocument) -> SpecDocument:
    """Returns the document with `auto` replaced by the dtype of the task's checkpoint; float32 where there is none.

    Raises:
        SpecError: there is no such model, or it is saved in a dtype that is not trained in.
    """
    spec = document.spec
    if spec.train.dtype != "auto":
        return document
    from sweeps.tasks import saved_dtype  # loads torch, which a spec that names its dtype need not wait for

    try:
        found = saved_dtype(spec.task)
    except TaskError as error:
        raise document.error(f"task.{error.path}", error.required, error.found, error.hint) from None
    known = [dtype for dtype in get_args(Dtype) if dtype != "auto"]
    if found not in known:
        why = ", which needs loss scaling" if found == "float16" else ""
        required = f"a model saved in {', '.join(known[:-1])} or {known[-1]}"
        way_out = "name the dtype to train in: bfloat16, or float32"
        raise document.error("train.dtype", required, f"auto, and one saved in {found}{why}", way_out)
    train = spec.train.model_copy(update={"dtype": found})
    return replace(document, spec=spec.model_copy(update={"train": train}))
