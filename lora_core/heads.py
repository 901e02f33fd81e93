"""Modules that are trained whole beside the adapters, such as a classifier: a copy for each member of a pack.

    suffix  meaning
    K       members of the pack
    N       rows a member brings

A gauge moves neither a head's weights nor its gradients, so its twins have the same learning rate for it, whatever
theirs for A and B are; that is why it needs one of its own, and stays outside the adapters' clip. PEFT calls such
modules `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.banked import BankedModule
from lora_core.targets import heads_of


def find_heads(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """Returns the modules that are trained whole by full name, in the model's order.

    Args:
        model: where to look.
        names: full names, or their ends after a dot, each of which is there; of two modules, one inside the other, the
            outer one is meant. None: those that PEFT takes for the model (`heads_of`), whichever are there.

    Raises:
        ValueError: a name that matches none, one without parameters, or one whose parameters are those of another
            module too.
    """
    if isinstance(names, str):
        raise ValueError(f"names of heads must be a list; found the text {names!r}: write [{names}]")
    wanted = heads_of(model) if names is None else names
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and any(is_called(name, each) for each in wanted):
            found[name] = module
    missing = [each for each in names or () if not any(is_called(name, each) for name, _ in model.named_modules())]
    if missing or not found:
        called = " or ".join(missing or wanted) or "by some name"
        raise ValueError(
            f"settings for a head need a module that is trained whole, called {called}; found none in this "
            f"{type(model).__name__}: name it in `heads`, or leave the settings out"
        )
    for name, module in found.items():
        _check_own_parameters(model, name, module)
    return found


def is_called(name: str, end: str) -> bool:
    """Whether a module's full name is this, or ends so after a dot."""
    return f".{name}".endswith(f".{end}")


def _check_own_parameters(model: nn.Module, name: str, module: nn.Module) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    if not own:
        raise ValueError(f"a head must have parameters to train; found none in {name!r}")
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{name}."):
            raise ValueError(f"a head must have parameters of its own; found that {name!r} shares one with {other!r}")


class _Gathered(torch.autograd.Function):
    """A view of the bank's storage whose gradient is added into the bank's: autograd's own accumulation wants a dense
    tensor, and these are strided."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.grad.add_(gradient)
        return None, None


class BankedHead(BankedModule):
    """K copies of one module, each over its own member's rows.

    The leading dimension of its input is K*N, member-major: the N rows of member 0 first. It computes in its input's
    dtype, whatever dtype the copies are kept in.

    Attributes:
        base: the model's own module, which gives the copies their shape, their code and their start.
    """

    def __init__(self, base: nn.Module, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """Takes views of the bank's storage.

        Args:
            base: the module.
            values: its parameters by name, each [K, ...].
            grads: their gradients, likewise.
        """
        super().__init__()
        self.base = base
        self._names = tuple(values)
        # A list, because names of parameters have dots in them.
        self.copies = nn.ParameterList(nn.Parameter(values[name]) for name in self._names)
        self._grads = tuple(grads[name] for name in self._names)

    @property
    def stored_K(self) -> Tensor:
        """One of the views."""
        stored_K: Tensor = self.copies[0]
        return stored_K

    @torch.no_grad()
    def reset(self) -> None:
        """Sets every copy to the model's own weights."""
        for name, copies in zip(self._names, self.copies, strict=True):
            copies.copy_(self.base.get_parameter(name))

    def forward(self, x: Tensor) -> Tensor:
        """[K*N, ...] -> [K*N, ...], as the module itself maps [N, ...] to [N, ...].

        Raises:
            ValueError: the leading dimension is not a multiple of K.
        """
        members, x = self._members_of(x), self._brought_here(x)
        # Ids that an embedding looks up stay as they are.
        dtype = self._computes_in(x if x.is_floating_point() else next(self.base.parameters()))
        x_KN = (x.to(dtype) if x.is_floating_point() else x).reshape(members, -1, *x.shape[1:])
        copies = {
            name: _Gathered.apply(value, grad).to(dtype)  # type: ignore[no-untyped-call]
            for name, value, grad in zip(self._names, self.copies, self._grads, strict=True)
        }

        def of_one(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(self.base, parameters, (rows,))
            return out

        # What a head draws at random in training mode is each row's own, as it is without a pack.
        out_KN: Tensor = torch.vmap(of_one, randomness="different")(copies, x_KN)
        return out_KN.flatten(0, 1)
