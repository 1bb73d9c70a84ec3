"""Which torch function is routed to which rule.

A rule is a function with the signature of the torch function it replaces, preceded by the tape::

    @route(F.linear)
    def linear(tape, input, weight, bias=None): ...

Modules of :mod:`fastreg.rules` register their rules on import; a user registers one in the same way.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Rule = TypeVar("Rule", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Route:
    """A registered rule.

    Attributes:
        rule: called as ``rule(tape, *args, **kwargs)``.
        always: whether it also serves calls that involve no tracked parameter, because it brings a double backward
            that torch lacks or a cheaper one.
        second_order: whether the double backward is all that it brings to such calls.
    """

    rule: Callable[..., Any]
    always: bool
    second_order: bool

    def serves(self, tracked: bool, first_order: bool) -> bool:
        """Whether a call goes to the rule, by whether it takes a tracked parameter."""
        return tracked or (self.always and not (self.second_order and first_order))


ROUTES: dict[Callable[..., Any], Route] = {}

# Of modules that define functions, those with the rules for them.
LATE = {"torch.nn.attention.varlen": "fastreg.rules.packed_attention"}


def load_late() -> None:
    """Register the rules that waited for modules which are imported by now."""
    for module, rules in LATE.items():
        if module in sys.modules and rules not in sys.modules:
            importlib.import_module(rules)


def route(
    *functions: Callable[..., Any], always: bool = False, second_order: bool = False
) -> Callable[[Rule], Rule]:
    """Register the decorated rule for each of ``functions``."""

    def register(rule: Rule) -> Rule:
        for function in functions:
            ROUTES[function] = Route(rule, always, second_order)
        return rule

    return register
