"""Which torch function is routed to which rule.

A rule is a function with the signature of the torch function it replaces, preceded by the tape::

    @route(F.linear)
    def linear(tape, input, weight, bias=None): ...

Modules of :mod:`fastreg.rules` register their rules on import; a user registers one in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """A registered rule.

    Attributes:
        rule: called as ``rule(tape, *args, **kwargs)``.
        always: whether it also serves calls that involve no tracked parameter, because it brings a double backward
            that torch lacks or a cheaper one.
    """

    rule: Callable[..., Tensor]
    always: bool


ROUTES: dict[Callable, Route] = {}


def route(*functions: Callable, always: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated rule for each of ``functions``."""

    def register(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for function in functions:
            ROUTES[function] = Route(rule, always)
        return rule

    return register
