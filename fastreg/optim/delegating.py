"""An optimizer that is another one in all but the way its step comes by gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

from torch import Tensor
from torch.optim import Optimizer

from fastreg.errors import FastregError


def _of_base(name: str) -> property:
    return property(
        lambda self: getattr(self.base, name),
        lambda self, value: setattr(self.base, name, value),
        lambda self: delattr(self.base, name),
        f"``{name}`` of the base optimizer.",
    )


class Delegating(Optimizer):
    """Groups, state, defaults, hooks and checkpoints are those of ``base``, by identity.

    Learning rate schedulers, gradient scalers and checkpointing see the base; its ``state_dict`` is the wrapper's, in
    both directions. Hooks run once, in the base's step.
    """

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise FastregError(
                f"{type(self).__name__}: base_optimizer must be a torch.optim.Optimizer, got {type(base).__name__} "
                "(build it first: torch.optim.SGD(model.parameters(), lr=0.1))"
            )
        _check_step(type(self).__name__, base)
        # Not Optimizer.__init__: it would make groups and state of its own.
        self.base = base

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    # By torch's annotation closures return numbers; its optimizers take tensors too.
    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The base's step; with a closure, at the gradients that a subclass makes of it."""
        if closure is None:
            self.base.step()
            return None
        loss = self.backward(closure)
        self.base.step()
        return loss

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Leave this optimizer's gradient in ``.grad``, without a step; the closure's loss."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the base."""
        self.base.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


# Set where types do not see it: they stay those of an Optimizer. The last two come and go by torch.amp.GradScaler,
# around the step of a fused optimizer.
for _name in ("param_groups", "state", "defaults", "grad_scale", "found_inf"):
    setattr(Delegating, _name, _of_base(_name))


def _check_step(wrapper: str, base: Optimizer) -> None:
    """Refuse a base whose step without a closure is none, or not its own."""
    name = type(base).__name__
    # Of the class: schedulers put a function of their own in the place of the bound method.
    _, *arguments = inspect.signature(type(base).step).parameters.values()
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in arguments):
        raise FastregError(
            f"{wrapper}: base_optimizer must step without a closure, got {name} (it runs its closure several times a "
            "step: for a penalty give it one that ends in reg(loss).backward(), without a wrapper)"
        )
    if isinstance(base, Delegating) and type(base).step is Delegating.step:
        raise FastregError(
            f"{wrapper}: base_optimizer must not make gradients of its own, got {name} (only one of them would: wrap "
            f"the optimizer inside it, {type(base.base).__name__})"
        )
