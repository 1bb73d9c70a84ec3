"""Compilation of functions that differentiate a model several times.

``torch.compile`` has no double backward. What a function does is therefore traced first, all its passes included, into
one graph of tensor operations without any autograd; that graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import stateless
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastreg.errors import FastregError


Compiler = Callable[[GraphModule, list[Tensor]], Callable]


def compile(function: Callable, model: nn.Module, *, compiler: Compiler | None = None) -> Compiled:
    """The same function, compiled: one graph from the forward to the last derivative.

    Parameters and buffers of the model are inputs of the graph, so that it stays valid while the model trains. A
    graph is made for every new combination of shapes, dtypes, devices, arguments that are not tensors, training and
    autocast modes; that takes as long as ``torch.compile`` does. Conditions on values (a loss of NaN) are looked at
    when a graph is made, and not again.

    Args:
        function: takes and returns tensors, or lists, tuples and dicts with tensors in them; what it runs the model
            in must attach to the model inside it, as the functions of :mod:`fastreg.curvature` do.
        model: every parameter that the function depends on belongs to it.
        compiler: takes the graph and example inputs, and returns a callable; Inductor by default.

    Returns:
        A callable like ``function``; results carry no graph.

    Raises:
        FastregError: the model is not a module.

    Example:
        >>> import torch, fastreg
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> hvp = fastreg.compile(
        ...     lambda x, y, v: fastreg.curvature.batched_hvp(model, loss_fn, (x, y), v), model
        ... )
        >>> hvp(*batch, torch.ones(8)).shape
        torch.Size([8])
    """
    if not isinstance(model, nn.Module):
        raise FastregError(f"compile: model must be a torch.nn.Module, got {type(model).__name__}")
    return Compiled(function, model, compiler or _inductor)


class Compiled:
    """What :func:`compile` returns."""

    def __init__(self, function: Callable, model: nn.Module, compiler: Compiler) -> None:
        self._function, self._model, self._compiler = function, model, compiler
        self._graphs: dict[Hashable, tuple[Callable, TreeSpec]] = {}

    def __call__(self, *args: object) -> object:
        leaves, spec = tree_flatten(args)
        state = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        inputs = [t.detach() for t in (*state.values(), *leaves) if isinstance(t, Tensor)]
        key = self._signature(leaves, spec, state)
        with torch.no_grad():
            if key not in self._graphs:
                self._graphs[key] = self._traced(leaves, spec, state, inputs)
            graph, returned = self._graphs[key]
            return tree_unflatten(graph(*inputs), returned)

    def _signature(self, leaves: list, spec: TreeSpec, state: dict[str, Tensor]) -> Hashable:
        kinds = [_kind(leaf) for leaf in (*leaves, *state.values())]
        modes = [module.training for module in self._model.modules()]
        casts = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
        return str(spec), *kinds, *modes, *casts

    def _traced(
        self, leaves: list, spec: TreeSpec, state: dict[str, Tensor], inputs: list[Tensor]
    ) -> tuple[Callable, TreeSpec]:
        # Imported where it is used: it takes longer than all the rest of fastreg.
        from torch.fx.experimental.proxy_tensor import make_fx

        returned: list[TreeSpec] = []

        def run(*inputs: Tensor) -> list:
            given = iter(inputs)
            own = {name: next(given).detach().requires_grad_(value.requires_grad) for name, value in state.items()}
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            with stateless._reparametrize_module(self._model, own, tie_weights=True):
                found, form = tree_flatten(self._function(*tree_unflatten(filled, spec)))
            returned.append(form)
            return [one.detach() if isinstance(one, Tensor) else one for one in found]

        graph = make_fx(run, tracing_mode="real")(*inputs)
        return self._compiler(graph, inputs), returned[-1]


def _inductor(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    import torch._inductor

    return torch._inductor.compile(graph, inputs)


def _kind(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf
