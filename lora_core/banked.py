"""What stands in a model for one of its own modules while a pack is trained over it.

suffix  meaning
K       members of the pack
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from lora_core.base import autocast_dtype


class BankedModule(nn.Module):
    """A module with parameters that are views of a bank's storage, and rows that are dealt to its members."""

    @property
    def stored_K(self) -> Tensor:
        """One of the views, [K, ...]."""
        raise NotImplementedError

    def _brought_here(self, x: Tensor) -> Tensor:
        """A tensor on the module's own device; where it is there already, itself.

        Of a model on several devices it comes from another one where a module begins a new one: what a model's own
        hooks would move there is moved by the module that stands in its place.
        """
        return x.to(self.stored_K.device)

    def _members_of(self, x: Tensor) -> int:
        """K, after checking that the rows of x can be dealt to the members.

        Raises:
            ValueError: the leading dimension is not a multiple of K.
        """
        members = len(self.stored_K)
        if x.shape[0] % members:
            raise ValueError(
                f"a pack of {members} needs a batch of {members} times the same rows; found {x.shape[0]} rows"
            )
        return members

    @staticmethod
    def _computes_in(x: Tensor) -> torch.dtype:
        """The input's dtype; autocast's, under autocast."""
        return autocast_dtype(x.device.type) or x.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(device), .half() and the like give parameters a storage of their own: training would go on in the old one,
        # and the model would silently never learn.
        before = self.stored_K.data_ptr()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.stored_K.data_ptr() != before:
            raise RuntimeError(
                "adapters must be attached after the model is on its device and in its dtype: detach first"
            )
        return self
