"""The op registry: one schema per op, several implementations, one rule of choice.

An op is a private torch operator ``fastreg::_<name>`` whose kernel walks the op's implementations
in order of preference and calls the first one that can run the call and is not measured to lose it.
``FASTREG_BACKEND`` or :func:`backend` forces one by name; a forced implementation that cannot run
raises, naming those that can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch._ops import OpOverload

from fastreg.errors import FastregError

BACKENDS = ("cuda", "triton", "native", "reference")

# The library object must outlive every operator defined through it.
_LIBRARY = torch.library.Library("fastreg", "FRAGMENT")
_OPS: dict[str, Op[Any]] = {}

# What an op returns: the same as its reference.
Out = TypeVar("Out")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Args:
        name: one of ``BACKENDS``.
        fn: takes the op's arguments, returns its outputs.
        why_not: takes the op's arguments; None, or the reason this implementation cannot run them.
        slower: takes the op's arguments; None, or the measured reason to leave the call to the next
            implementation. It steers the choice only: a forced implementation ignores it.
    """

    name: str
    fn: Callable[..., Any]
    why_not: Callable[..., str | None]
    slower: Callable[..., str | None] | None = None

    def refusal(self, args: tuple[object, ...]) -> str | None:
        """Why the automatic choice passes over this implementation, or None."""
        reason = self.why_not(*args)
        if reason is None and self.slower is not None:
            return self.slower(*args)
        return reason


@dataclass(frozen=True)
class Candidate:
    """One line of :func:`explain`: an implementation, whether it is chosen, and why not."""

    name: str
    chosen: bool
    reason: str | None


def _always(*_args: object) -> None:
    return None


@dataclass(frozen=True)
class Op(Generic[Out]):
    """An op: schema, oracle, implementations and example inputs.

    Args:
        name: public name; the torch operator is ``fastreg::_<name>``.
        schema: torch schema without the name, e.g. ``"(Tensor a, int[] offsets) -> Tensor"``.
        reference: the plain torch definition; oracle, last resort and fake implementation.
        examples: ``examples(dtype, device)`` returns argument tuples that cover the op's cases.
        implementations: in order of preference; the reference is appended.
    """

    name: str
    schema: str
    reference: Callable[..., Out]
    examples: Callable[[torch.dtype, str], list[tuple[object, ...]]]
    implementations: tuple[Implementation, ...] = ()
    overload: OpOverload[..., Out] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.name in _OPS:
            raise FastregError(f"Op: name must be new, got {self.name!r}")
        for implementation in self.implementations:
            if implementation.name not in BACKENDS[:-1]:
                raise FastregError(
                    f"Op: implementation name must be one of {BACKENDS[:-1]}, got {implementation.name!r}"
                )
        last = Implementation("reference", self.reference, _always)
        object.__setattr__(self, "implementations", (*self.implementations, last))
        _LIBRARY.define(f"_{self.name}{self.schema}")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(f"_{self.name}", self.run, key)
        torch.library.register_fake(f"fastreg::_{self.name}", self.reference, lib=_LIBRARY)
        object.__setattr__(self, "overload", getattr(torch.ops.fastreg, f"_{self.name}").default)
        _OPS[self.name] = self

    def __call__(self, *args: object) -> Out:
        # The dispatcher costs as much as a small op; it is needed only where somebody listens to it.
        if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
            return self.overload(*args)
        return self.run(*args)

    def run(self, *args: object) -> Out:
        """Call the chosen implementation directly, below torch's dispatcher."""
        return chosen(self.name, self.implementations, args).fn(*args)


def chosen(function: str, implementations: tuple[Implementation, ...], args: tuple[object, ...]) -> Implementation:
    """The forced implementation, or the first that can run ``args`` and is not measured to lose.

    Raises:
        FastregError: the forced one cannot.
    """
    if _forced.name is not None:
        return _required(function, implementations, _forced.name, args)
    for implementation in implementations:
        if implementation.refusal(args) is None:
            return implementation
    raise AssertionError("the reference runs everything")


def _required(
    function: str, implementations: tuple[Implementation, ...], name: str, args: tuple[object, ...]
) -> Implementation:
    """The implementation called ``name``; FastregError if it cannot run ``args``."""
    reason: str | None = f"{function} has no such implementation"
    for implementation in implementations:
        if implementation.name == name:
            reason = implementation.why_not(*args)
            if reason is None:
                return implementation
    able = [i.name for i in implementations if i.why_not(*args) is None]
    raise FastregError(
        f"{function}: backend must be one that can run this call, got {name!r} "
        f"({reason}; available: {', '.join(able)})"
    )


class _Forced:
    """The forced backend. One per process, not per context: CUDA backward passes run in other threads."""

    def __init__(self) -> None:
        self.name: str | None = None

    def set(self, name: str | None, source: str) -> None:
        if name is not None and name not in BACKENDS:
            raise FastregError(f"{source}: name must be one of {', '.join(BACKENDS)}, got {name!r}")
        self.name = name


_forced = _Forced()
_forced.set(os.environ.get("FASTREG_BACKEND") or None, "FASTREG_BACKEND")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op inside the block to run on one backend; None restores the automatic choice.

    Args:
        name: ``"native"``, ``"triton"``, ``"cuda"``, ``"reference"`` or None.

    Raises:
        FastregError: unknown name, or, at the call, an op the backend cannot run.

    Example:
        >>> from fastreg.kernels import backend
        >>> with backend("reference"):
        ...     pass
    """
    previous = _forced.name
    _forced.set(name, "backend")
    try:
        yield
    finally:
        _forced.name = previous


def explain(op_name: str, *args: object) -> list[Candidate]:
    """Which implementation of an op would run these arguments, and why not the others.

    Args:
        op_name: a key of :func:`registry`.
        args: the op's arguments, as in its schema.

    Returns:
        One Candidate per implementation, in order of preference.

    Raises:
        FastregError: unknown op.
    """
    if op_name not in _OPS:
        raise FastregError(f"explain: op_name must be one of {', '.join(sorted(_OPS))}, got {op_name!r}")
    lines: list[Candidate] = []
    for implementation in _OPS[op_name].implementations:
        reason = implementation.refusal(args)
        if _forced.name is not None:
            reason = implementation.why_not(*args)
            if implementation.name != _forced.name:
                reason = f"backend {_forced.name!r} is forced"
        chosen = reason is None and not any(line.chosen for line in lines)
        lines.append(Candidate(implementation.name, chosen, reason))
    return lines


def has_fast_form(op_name: str, x: Tensor) -> bool:
    """Whether anything but the reference would be chosen for data of this dtype and on this device."""
    *fast, _reference = _OPS[op_name].implementations
    return any(implementation.refusal((x,)) is None for implementation in fast)


def registry() -> Mapping[str, Op[Any]]:
    """Every op by name (read-only)."""
    return MappingProxyType(_OPS)
