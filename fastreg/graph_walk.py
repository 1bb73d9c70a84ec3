"""A walk over the loss's graph, once, for operations that are silently wrong or missing under double backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from fastreg.errors import FastregError
from fastreg.rules.routing import Routed
from fastreg.rules.spread import Spread
from fastreg.session import Session

_ATTENTION = "compute attention with F.scaled_dot_product_attention inside the model, where it is routed"
# Prefix of the graph node's name -> what it is and what to do.
OFFENDERS: dict[str, tuple[str, str]] = {
    "ScaledDotProduct": ("a fused attention outside the recorded model", _ATTENTION),
    "CompiledFunction": ("a torch.compile'd function, which has no double backward", "use the function uncompiled"),
    "CheckpointFunction": ("reentrant activation checkpointing", "pass use_reentrant=False to checkpoint"),
    "CudnnRnn": ("a cuDNN recurrent layer, which has no double backward", "set torch.backends.cudnn.enabled = False"),
    "MkldnnRnnLayer": ("a fused recurrent layer", "keep the layer's parameters tracked, so that it is routed"),
    "EmbeddingBag": ("EmbeddingBag, which has no double backward", "use Embedding and a sum or mean"),
    "CtcLoss": ("CTC loss, which has no double backward", "use another loss, or leave this one out of reg"),
    "LinearCrossEntropy": ("a loss that computes its gradient in the forward", "use linear and cross_entropy"),
}

# Prefixes of nodes whose functions are piecewise linear.
KINKS = ("Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Hardtanh", "Hardswish", "Hardsigmoid", "Threshold",
         "Abs", "Clamp", "Softshrink", "Hardshrink", "MaxPool", "Maximum", "Minimum")  # fmt: skip

_ROUTED = (Routed, Spread)
_trusted: set[type] = set()


def trust(function: type[Function]) -> type[Function]:
    """Declare that a custom function's backward is right although it does not involve its inputs (a linear map).

    Example:
        >>> import torch, fastreg
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x): return 2 * x
        ...     @staticmethod
        ...     def backward(ctx, d): return 2 * d
        >>> fastreg.trust(Scale).__name__
        'Scale'
    """
    _trusted.add(function)
    return function


def refuse_offenders(loss: Tensor, session: Session, names: dict[int, str]) -> None:
    """Raise FastregError, by name and with the remedy, for what would be wrong without a word.

    Parts of the graph that are run again in a backward are looked at when they are.

    Args:
        names: of the tracked parameters, by identity.
    """
    session.inspect = partial(_refuse_offenders, names=names)
    _refuse_offenders([loss], session, names)


def _refuse_offenders(roots: Sequence[Tensor], session: Session, names: dict[int, str]) -> None:
    nodes = list(_nodes(root.grad_fn for root in roots))
    _refuse_unrecorded_uses(nodes, names)
    for node in nodes:
        name = type(node).__name__
        for prefix, (what, remedy) in OFFENDERS.items():
            if name.startswith(prefix) or name.startswith(f"GeneratedBackwardFor_aten_{prefix}"):
                raise FastregError(f"reg: the loss must be twice differentiable, got {name}: {what} ({remedy})")
        if _custom(node):
            _check_function(node, session)


def kinks(loss: Tensor) -> list[str]:
    """Names of the piecewise linear operations that lead to the loss."""
    names = {type(node).__name__ for node in _nodes([loss.grad_fn])}
    return sorted(name.removesuffix("Backward0") for name in names if name.startswith(KINKS))


def ends(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Those from which no other is computed, each once."""
    used = {edge for node in _nodes(t.grad_fn for t in outputs) for edge in node.next_functions}
    return [t for t in {id(t): t for t in outputs}.values() if (t.grad_fn, t.output_nr) not in used]


def leaves_of(roots: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of their graph."""
    return [node.variable for node in _nodes(root.grad_fn for root in roots) if hasattr(node, "variable")]


def _refuse_unrecorded_uses(nodes: list[Any], names: dict[int, str]) -> None:
    """A tracked parameter may be met by recorded operations, and by what leads to their weight and bias, alone."""
    recorded = {node for node in nodes if _custom(node) and _ours(node._forward_cls)}
    # The edges of a routed operation are those of x, of its weight and bias if it has them, and of what stands beside.
    sides = [edge for node in recorded if node._forward_cls in _ROUTED for edge, _ in node.next_functions[1:]]
    # Those of a part that is run again: the arguments that derive from a parameter alone.
    sides += [node.next_functions[i][0] for node in recorded for i in getattr(node, "derived", ())]
    allowed = recorded | set(_nodes(sides))
    for node in nodes:
        if node in allowed:
            continue
        for parent, _ in node.next_functions:
            name = names.get(id(getattr(parent, "variable", None)))
            if name is not None:
                raise FastregError(
                    f"reg: parameter {name!r} must act inside the recorded forward, got a use by {type(node).__name__} "
                    "outside it, which the norms would miss (compute heads inside the model; add terms that do not "
                    "depend on samples, such as weight decay, to the loss that reg returns)"
                )


def _custom(node: Any) -> bool:
    return isinstance(node, BackwardCFunction)


def _ours(function: type) -> bool:
    return function.__module__.partition(".")[0] == "fastreg"


def _check_function(node: Any, session: Session) -> None:
    function = node._forward_cls
    if function in _ROUTED:
        if node.use.session is not session:
            raise FastregError(
                "reg: the loss must depend on forwards recorded since the last call of reg, got an earlier one "
                "(call reg once for every loss)"
            )
        return
    if function in _trusted or _ours(function):
        return
    if _once_differentiable(function):
        raise FastregError(
            f"reg: the loss must be twice differentiable, got {function.__name__}, whose backward is "
            "@once_differentiable (write a differentiable backward, or leave it out of the loss)"
        )
    if not _depends_on_inputs(node):
        raise FastregError(
            f"reg: the loss must be twice differentiable, got {function.__name__}, whose backward does not involve "
            "its inputs: it computes its gradient in the forward, or is a linear map (use plain operations; if it "
            "is linear, say so with fastreg.trust)"
        )


def _once_differentiable(function: type[Function]) -> bool:
    """The decorator replaces backward by a wrapper compiled in torch.autograd.function."""
    code = getattr(function.backward, "__code__", None)
    return code is not None and code.co_filename == torch.autograd.function.once_differentiable.__code__.co_filename


def _depends_on_inputs(node: Any) -> bool:
    """Whether the graph of the node's backward leads back to where its inputs came from."""
    cotangents = [
        torch.randn(tuple(meta.shape), dtype=meta.dtype, device=meta.device).requires_grad_()
        for meta in node._input_metadata
    ]
    with torch.enable_grad():
        gradients = node.apply(*cotangents)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    producers = {producer for producer, _ in node.next_functions if producer is not None}
    starts = [g.grad_fn for g in gradients if isinstance(g, Tensor) and g.grad_fn is not None]
    return any(found in producers for found in _nodes(starts))


def _nodes(starts: Iterable[Any]) -> Iterator[Any]:
    stack = [node for node in starts if node is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
