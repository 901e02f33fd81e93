"""An optimizer that the table of laws does not have, as a `PackOptimizer` takes it.

suffix  meaning
R       a member's rank
I, O    a layer's input and output width
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from lora_core.gauge import FactorSettings
from lora_core.laws import Constant


@dataclass(frozen=True)
class ForeignOptimizer:
    """An optimizer that the table does not have, as an `OptimizerKind`.

    It gets each layer's A [R, I] and B [O, R], contiguous, as a stock trainer would give them, and its constants when
    it is made. Its state is not for checkpoints: `PackOptimizer.state` does not see all of it.

    Attributes:
        make: a subclass of torch.optim.Optimizer, or a callable that returns one; called as make(groups, lr=..., ...).

    Raises:
        ValueError: `make` is no such thing, takes no lr, or cannot do without other arguments.
    """

    make: Callable[..., torch.optim.Optimizer]

    def __post_init__(self) -> None:
        required = "an optimizer must be a subclass of torch.optim.Optimizer, or a callable that returns one"
        is_class = isinstance(self.make, type)
        if not callable(self.make) or (is_class and not issubclass(self.make, torch.optim.Optimizer)):  # type: ignore[arg-type]
            raise ValueError(f"{required}; found {self.name}")
        if "lr" not in self._parameters:
            known = ", ".join(self._parameters) or "none"
            raise ValueError(f"{self.name} must take a learning rate as lr; found the arguments {known}")
        needed = [name for name in _required(self._parameters) if name not in ("lr", self._decay)]
        if needed:
            raise ValueError(
                f"{self.name} must be makeable from parameters and lr alone; found that it needs {', '.join(needed)}: "
                "give a callable that fills them in"
            )

    @property
    def name(self) -> str:
        """`Lion`."""
        made = self.make.func if isinstance(self.make, partial) else self.make
        return str(getattr(made, "__name__", made))

    @property
    def has_decay(self) -> bool:
        """Whether it takes `weight_decay`."""
        return self._decay in self._parameters

    @cached_property
    def constants(self) -> dict[str, Constant]:
        """The constants that a gauge may have to move, with their defaults; what is None in a tuple is left out."""
        found = {
            name: _numbers(parameter.default)
            for name, parameter in self._parameters.items()
            if name not in ("lr", self._decay)
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def matrices(self) -> bool:
        """True: it may look at a matrix as a whole."""
        return True

    @property
    def constants_at_construction(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.constants)

    def group(self, settings: FactorSettings) -> dict[str, Any]:
        """What a parameter group holds of a factor's settings; a constant that they do not have has its default.

        Raises:
            ValueError: the optimizer has no weight decay and one is asked for.
        """
        group: dict[str, Any] = {"lr": settings.lr}
        for name, default in self.constants.items():
            value = settings.constants.get(name, default)
            group[name] = self._filled(name, value) if isinstance(value, tuple) else value
        if self.has_decay:
            group[self._decay] = settings.weight_decay
        elif settings.weight_decay:
            raise ValueError(
                f"{self.name} has no weight decay; found weight_decay={settings.weight_decay!r}: set it to 0"
            )
        return group

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Makes the optimizer.

        Raises:
            ValueError: the constructor raises, or what it returns is not an optimizer with these parameter groups that
                steps without a closure.
        """
        pairs = [(group["params"][0], _own_copy(group["params"][0])) for group in groups]
        # Constants are given as arguments alone: in a group they would replace what the constructor makes of them.
        kept = [name for name in ("lr", self._decay) if name in groups[0]]
        handed = [
            {"params": [own]} | {name: group[name] for name in kept}
            for group, (_, own) in zip(groups, pairs, strict=True)
        ]
        arguments = {name: groups[0][name] for name in (*kept, *self.constants)}
        try:
            optimizer = self.make(handed, **arguments)
        except Exception as error:
            raise ValueError(f"{self.name} refuses {arguments}: {type(error).__name__}: {error}") from error
        if not isinstance(optimizer, torch.optim.Optimizer) or len(getattr(optimizer, "param_groups", ())) != len(
            groups
        ):
            raise ValueError(
                f"{self.name} must return an optimizer with {len(groups)} groups; found a {type(optimizer).__name__}"
            )
        if needed := _required(inspect.signature(optimizer.step).parameters):
            raise ValueError(f"{self.name} must step without arguments; found that it needs {', '.join(needed)}")
        try:
            _keep_in_step(pairs, optimizer)
        except AttributeError as error:
            raise ValueError(f"{self.name} must call torch.optim.Optimizer.__init__; found: {error}") from error
        optimizer.step = self._named(optimizer.step)  # type: ignore[assignment]
        return optimizer

    def _named(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A step that says whose fault it is when it raises."""

        def named() -> Any:
            try:
                return step()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise ValueError(f"{self.name} fails in its step: {type(error).__name__}: {error}") from error

        return named

    _decay = "weight_decay"

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        """Those of the constructor, but for the first, which takes the weights."""
        try:
            signature = inspect.signature(self.make)
        except (TypeError, ValueError) as error:
            raise ValueError(f"an optimizer must say what arguments it takes; {self.name} does not: {error}") from None
        return dict(itertools.islice(signature.parameters.items(), 1, None))

    def _filled(self, name: str, numbers: tuple[float, ...]) -> tuple[float | None, ...]:
        """A tuple as the constructor wants it, with the default's None in their places."""
        rest = iter(numbers)
        return tuple(None if entry is None else next(rest) for entry in self._parameters[name].default)


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The names of those that a call must give."""
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, each in parameters.items() if each.default is each.empty and each.kind not in rest]


def _numbers(default: Any) -> Constant | None:
    """A default as a constant that may have to move; None if it is no such thing: a flag, a count, a word or a zero."""
    if isinstance(default, float) and default > 0:
        return default
    if isinstance(default, tuple | list):
        numbers = [entry for entry in default if entry is not None]
        if any(numbers) and all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in numbers):
            return tuple(map(float, numbers))
    return None


def _own_copy(param: nn.Parameter) -> nn.Parameter:
    # Of every matrix: an optimizer that sets `p.data` would cut a view of the bank off, and go on training its own.
    return nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))


def _keep_in_step(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's own copies of parameters (second of a pair) follow them and lead them in each step."""

    @torch.no_grad()
    def before(*_: Any) -> None:
        for param, own in pairs:
            own.copy_(param)
            own.grad = None if param.grad is None else param.grad.contiguous()

    @torch.no_grad()
    def after(*_: Any) -> None:
        for param, own in pairs:
            param.copy_(own)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
