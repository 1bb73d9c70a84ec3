"""Compilation of functions that differentiate a model several times.

``torch.compile`` has no double backward. What a function does is therefore traced first, all its passes included, into
one graph of tensor operations without any autograd; that graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fastreg import hosted
from fastreg.errors import FastregError
from fastreg.recording import attached
from fastreg.regularizer import Regularizer
from fastreg.sharding import fully_sharded

Compiler = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]
Out = TypeVar("Out")


def compile(
    function: Callable[..., Out],
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    options: dict[str, Any] | None = None,
    compiler: Compiler | None = None,
) -> Compiled[Out]:
    """The same function, compiled: one graph from the forward to the last derivative.

    A function may be a whole training step: with ``loss = reg(loss)`` and ``loss.backward()`` in it, gradients are
    found in ``.grad`` of the parameters afterwards, added to what was there before, and ``reg.metrics`` has the values
    of the step. Weights that follow a schedule, draws of labels and directions go on as in eager steps. With
    ``optimizer`` its step may be in the function too.

    Parameters and buffers of the model are inputs of the graph, so that it stays valid while the model trains. A
    graph is made for every new combination of shapes, dtypes, devices, arguments that are not tensors, training and
    autocast modes, gradients that are there or not, and numbers among the optimizer's settings; that takes as long as
    ``torch.compile`` does. Conditions on values (a loss of NaN) are looked at when a graph is made, and not again.
    The first step with a Regularizer or an optimizer runs eagerly: the one checks itself, the other makes its state.

    Args:
        function: takes and returns tensors, or lists, tuples and dicts with tensors in them; what it runs the model
            in is a :class:`fastreg.Regularizer`, or attaches to the model inside it, as the functions of
            :mod:`fastreg.curvature` do.
        model: every parameter that the function depends on belongs to it.
        optimizer: that which the function steps; with settings that change (a learning rate) as tensors, and
            ``capturable=True`` or ``fused=True`` where it has them (Inductor knows no fused ones on the CPU: leave
            their step out of the function there). Call ``zero_grad`` outside of the function.
        options: of Inductor, as ``torch.compile`` takes them; with ``{"triton.cudagraphs": True}`` kernels are launched
            as one CUDA graph, and what a step leaves is copied out of it.
        compiler: in the place of Inductor: takes the graph and example inputs, and returns a callable.

    Returns:
        A callable like ``function``; results carry no graph.

    Raises:
        FastregError: both ``options`` and ``compiler`` are given; the model is not a module, or is one that exchanges
            gradients between processes; at the call: a Monitor or SAM is attached to the model, a Regularizer
            estimates by ``fraction`` or perturbs, the backward draws random numbers (activation
            checkpointing with dropout).

    Example:
        >>> import torch, fastreg
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.01), micro_batch_size=4)
        >>> def step(x, y):
        ...     loss = reg(torch.nn.functional.cross_entropy(model(x), y))
        ...     loss.backward()
        ...     return loss
        >>> compiled = fastreg.compile(step, model)
        >>> for _ in range(3):
        ...     model.zero_grad()
        ...     loss = compiled(*batch)
        >>> model.weight.grad.shape
        torch.Size([2, 3])
    """
    if not isinstance(model, nn.Module):
        raise FastregError(f"compile: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel) or fully_sharded(model):
        raise FastregError(
            f"compile: model must not exchange gradients between processes, got {type(model).__name__} (compile the "
            "step of the module inside it, and average the gradients that it leaves with torch.distributed.all_reduce)"
        )
    if options is not None and compiler is not None:
        raise FastregError("compile: options must be None with a compiler, for which they are not, got both")
    return Compiled(function, model, optimizer, compiler or partial(_inductor, options or {}))


class Compiled(Generic[Out]):
    """What :func:`compile` returns."""

    def __init__(
        self, function: Callable[..., Out], model: nn.Module, optimizer: Optimizer | None, compiler: Compiler
    ) -> None:
        self._function, self._model, self._optimizer, self._compiler = function, model, optimizer, compiler
        self._graphs: dict[Hashable, _Graph] = {}
        self._prepared = optimizer is None

    def __call__(self, *args: object) -> Out:
        owners = _owners(self._model)
        plans = [owner.plan() for owner in owners]
        if any(eager for eager, _ in plans) or not self._prepared:
            self._prepared = True
            return _detached(self._function(*args))
        leaves, spec = tree_flatten(args)
        state = list(self._state())
        inputs = [*state, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        key = self._signature(leaves, spec, state, plans)
        if key in self._graphs:
            return self._graphs[key].run(inputs, self._model, owners)
        found, self._graphs[key] = self._traced(leaves, spec, inputs, owners)
        return found

    def _state(self) -> Iterator[Tensor]:
        """Tensors that the function may read or write without being given them."""
        yield from self._model.parameters()
        yield from self._model.buffers()
        yield from (p.grad for p in self._model.parameters() if p.grad is not None)
        if self._optimizer is not None:
            own = tree_leaves([self._settings(), list(self._optimizer.state.values())])
            yield from (leaf for leaf in own if isinstance(leaf, Tensor))

    def _settings(self) -> list[object]:
        """Of the optimizer's groups."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return [value for group in groups for name, value in group.items() if name != "params"]

    def _signature(self, leaves: list[Any], spec: TreeSpec, state: list[Tensor], plans: list[Any]) -> Hashable:
        kinds = [_kind(leaf) for leaf in (*leaves, *state)]
        modes = [module.training for module in self._model.modules()]
        casts = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
        there = [p.grad is not None for p in self._model.parameters()]
        settings = [leaf for leaf in tree_leaves(self._settings()) if not isinstance(leaf, Tensor)]
        return str(spec), *kinds, *modes, *casts, *there, *settings, *plans, torch.is_grad_enabled()

    def _traced(
        self, leaves: list[Any], spec: TreeSpec, inputs: list[Tensor], owners: list[Regularizer]
    ) -> tuple[Out, _Graph]:
        """What the function returns, and a graph of what it did."""
        # Imported where it is used: it takes longer than all the rest of fastreg.
        from torch.fx.experimental.proxy_tensor import make_fx

        traced: list[_Results] = []

        def run(*inputs: Tensor) -> list[Tensor]:
            given = iter(inputs[len(inputs) - sum(isinstance(leaf, Tensor) for leaf in leaves) :])
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            found = _detached(self._function(*tree_unflatten(filled, spec)))
            gradients = _new_gradients(self._model, before)
            traced.append(_Results(found, gradients, [_kept(*pair) for pair in zip(owners, reported, strict=True)]))
            return [one for one in tree_leaves(traced[-1]) if isinstance(one, Tensor)]

        before, reported = [p.grad for p in self._model.parameters()], [owner.metrics for owner in owners]
        with hosted.collected() as numbers, _NoDrawsInBackward(), _values_are_unknown():
            graph = make_fx(run)(*inputs)
        hosted.gather_placeholders(list(graph.graph.nodes))
        graph.recompile()
        return traced[-1].returned, _Graph(graph, self._compiler, numbers, traced[-1])


class _Results(NamedTuple):
    """What a step leaves.

    Attributes:
        returned: by the function.
        gradients: those in ``.grad`` that are other tensors than before, by the number of the parameter.
        kept: by every Regularizer; None by one that left its penalties out.
    """

    returned: Any
    gradients: dict[int, Tensor | None]
    kept: list[tuple[Any, ...] | None]


class _Graph:
    """A traced step."""

    def __init__(self, graph: GraphModule, compiler: Compiler, numbers: hosted.Numbers, results: _Results) -> None:
        self._graph, self._compiler, self._numbers = graph, compiler, numbers
        self._compiled: Callable[..., Any] | None = None
        leaves, self._form = tree_flatten(results)
        self._template = [_FROM_GRAPH if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    @torch.no_grad()
    def run(self, inputs: list[Tensor], model: nn.Module, owners: list[Regularizer]) -> Any:
        """Take the step."""
        inputs = [t.detach() for t in (*inputs, *hosted.numbers(self._numbers))]
        # Autocast's casts are in the graph.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            if self._compiled is None:
                self._compiled = self._compiler(self._graph, inputs)
            found = iter(self._compiled(*inputs))
        leaves = [next(found) if leaf is _FROM_GRAPH else leaf for leaf in self._template]
        results = tree_unflatten(leaves, self._form)
        parameters = list(model.parameters())
        for number, gradient in results.gradients.items():
            parameters[number].grad = gradient
        for owner, kept in zip(owners, results.kept, strict=True):
            if kept is not None:
                _keep(owner, kept)
        return results.returned


_FROM_GRAPH = object()


class _NoDrawsInBackward(TorchDispatchMode):
    """Refuses random numbers in a backward: generators that are set back there, as a graph does not know."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if torch.Tag.nondeterministic_seeded in func.tags and torch._C._current_graph_task_id() != -1:
            raise FastregError(
                f"compile: a backward must not draw random numbers, got {func} (activation checkpointing of dropout: "
                "leave out one of them; the compiler chooses what to compute again)"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def _values_are_unknown() -> Iterator[None]:
    """Says in our words that a number was read out of a tensor."""
    try:
        yield
    except RuntimeError as error:
        if "_local_scalar_dense" not in str(error):
            raise
        raise FastregError(
            "compile: the function must not read numbers out of tensors, got .item() or the like (optimizers do: give "
            "them lr=torch.tensor(...), and fused=True or capturable=True, or leave their step out of the function)"
        ) from error


def _owners(model: nn.Module) -> list[Regularizer]:
    found = [recorder.owner for recorder in attached(model)]
    owners = [owner for owner in found if isinstance(owner, Regularizer)]
    if len(owners) < len(found):
        raise FastregError(
            "compile: what is attached to the model must be a Regularizer, got a Monitor, SAM or magnitudes of a "
            "Grafted (remove() it; with them compile the model itself: torch.compile(model))"
        )
    return owners


def _kept(owner: Regularizer, reported: dict[str, Tensor]) -> tuple[Any, ...] | None:
    if owner.metrics is reported:
        return None
    own = [[getattr(penalty, name) for name in penalty.kept] for penalty in owner.penalties]
    return _detached((owner.metrics, owner.sq_norms, own))


def _keep(owner: Regularizer, kept: tuple[Any, ...]) -> None:
    owner.metrics, owner.sq_norms, own = kept
    for penalty, values in zip(owner.penalties, own, strict=True):
        for name, value in zip(penalty.kept, values, strict=True):
            setattr(penalty, name, value)


def _new_gradients(model: nn.Module, before: list[Tensor | None]) -> dict[int, Tensor | None]:
    now = (p.grad for p in model.parameters())
    return {number: new for number, (new, old) in enumerate(zip(now, before, strict=True)) if new is not old}


def _detached(values: Any) -> Any:
    return tree_map_only(Tensor, torch.Tensor.detach, values)


def _inductor(options: dict[str, Any], graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    import torch._inductor

    compiled = torch._inductor.compile(graph, inputs, options=options)
    if not options.get("triton.cudagraphs"):
        return compiled

    def run(*inputs: Tensor) -> list[Tensor]:
        # The next step writes where this one has left its results.
        torch.compiler.cudagraph_mark_step_begin()
        return [found.clone() for found in compiled(*inputs)]

    return run


def _kind(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf
